"""MiniMax-01 (arXiv 2501.08313): lightning attention in most layers, softmax attention in the others, experts in each.

The residual carries the norm of the stream, not the stream: alpha * norm + beta * sub-layer. Each kind of sub-layer has
its own factors, so each sub-layer is one of our layers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusiontree.branches import Attention, Lightning, Moe
from fusiontree.core.model.layers import LayerSpec, Residual
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import delta, parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope_parameters, rope_theta
from fusiontree.zoo.tensors import Part, Renamed, below, interleaved, linear

THETA = 1_000_000.0
IDLE = ("block_size", "router_jitter_noise", "router_aux_loss_coef", "shared_moe_mode")
"""Options that do not change the function: block size, training, and the mode of an absent shared expert."""
FACTORS = {"linear_attn": "lightning", "full_attn": "attention", "mlp": "moe"}
"""How the names of their factors begin, and our kinds."""
DEFAULTS = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "block_size": 256,
    **{f"{name}_{factor}_factor": 1.0 for name in FACTORS for factor in ("alpha", "beta")},
}


@register
class MiniMax(Family):
    """A mixer and experts in each layer, which is two layers of ours."""

    name = "minimax"
    architecture = "MiniMaxForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu")
        options.only("postnorm", True)  # the first conversions say so
        options.only("shared_intermediate_size", 0)
        for key in IDLE:
            options.get(key, None)
        norm, attends = parts.rms(options), _attends(options)
        attention, moe, rope = _attention(options), _moe(options), rope_theta(options, THETA)
        residuals = _residuals(options)
        layers: list[dict[str, Any]] = []
        for index, full in enumerate(attends):
            mixer = attention if full else _lightning(options, index)
            layers.append({"mixer": mixer, "norm": norm, "residual": residuals[mixer["kind"]]})
            layers.append({"ffn": moe, "norm": norm, "residual": residuals["moe"]})
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "encodings": {"rope": rope} if any(attends) else {},
            "layers": layers,
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"]},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        spec, moe = reader.spec, reader.first("moe")
        mixers = [layer for layer in reader.layers if layer.mixer is not None]
        slots = [(layer.mixer is not None, layer.ffn is not None) for layer in reader.layers]
        if slots != [(True, False), (False, True)] * len(mixers):
            raise FusionTreeError("layers: in minimax a mixer and experts take turns, each in a layer of its own")
        linear = [isinstance(layer.mixer, Lightning) for layer in mixers]
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "num_hidden_layers": len(mixers),
            "layer_types": [delta.LINEAR if each else delta.FULL for each in linear],
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "intermediate_size": moe.hidden,
            "hidden_act": "silu",
            "rms_norm_eps": spec.norm.eps,
            "tie_word_embeddings": spec.head.tied,
            **_factors(reader.layers),
            **_mixer_config(reader),
        }

    def computed(self, options: Options) -> dict[str, Callable[[], Tensor]]:
        """Decays of lightning attention, which transformers saves although they follow from the config."""
        layers = [index for index, full in enumerate(_attends(options)) if not full]
        return {
            f"model.layers.{index}.self_attn.{name}": partial(decays, options, index)
            for index in layers
            for name, decays in COMPUTED.items()
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        yield from _tensors(spec, "mlp", parts.experts)

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        maps = {"w1": "gate", "w3": "up", "w2": "down"}
        yield from _tensors(spec, "block_sparse_moe", lambda node: parts.experts_apart(node, maps))


def _tensors(spec: ModelSpec, moe: str, experts: Callable[[Moe], Iterator[Part]]) -> Iterator[Part]:
    yield from parts.whole(spec, "norm")
    for index, layer in enumerate(spec.expanded_layers()):
        slot, norm = ("mixer", "input_layernorm") if layer.mixer else ("ffn", "post_attention_layernorm")
        theirs, ours = f"model.layers.{index // 2}", f"layers.{index}"
        yield Renamed(f"{theirs}.{norm}.weight", (f"{ours}.norm.{slot}.before.weight",))
        match layer.mixer or layer.ffn:
            case Attention() as node:
                yield from below(f"{theirs}.self_attn", f"{ours}.mixer", parts.attention(node))
            case Lightning() as node:
                yield from below(f"{theirs}.self_attn", f"{ours}.mixer", _lightning_tensors(node))
            case Moe() as node:
                yield from linear(f"{theirs}.{moe}.gate", f"{ours}.ffn.router")
                yield from below(f"{theirs}.{moe}.experts", f"{ours}.ffn.experts", experts(node))


def _lightning_tensors(node: Lightning) -> Iterator[Renamed]:
    """The rows of `qkv_proj` are grouped by head: query, key, value."""
    names, view = ("q.weight", "k.weight", "v.weight"), interleaved(node.heads, *(node.head_dim,) * 3)
    yield Renamed("qkv_proj.weight", names, (node.heads * node.head_dim,) * 3, view)
    yield Renamed("norm.weight", ("norm.weight",))
    yield from linear("output_gate", "z")
    yield from linear("out_proj", "out")


def _attends(options: Options) -> list[bool]:
    """Whether each layer has softmax attention; by default every second layer, from the first on."""
    return delta.attends(options, lambda index: index % 2 == 0)


def _residuals(options: Options) -> dict[str, dict[str, Any]]:
    def factors(name: str) -> dict[str, Any]:
        return {"from": "normed", "keep": options[f"{name}_alpha_factor"], "add": options[f"{name}_beta_factor"]}

    return {kind: factors(name) for name, kind in FACTORS.items()}


def _attention(options: Options) -> dict[str, Any]:
    heads, head_dim = options.count("num_attention_heads"), parts.head_dim(options)
    options.only("rotary_dim", head_dim)  # the authors' code rotates so many channels, transformers rotates all
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "window": options.get("sliding_window", None),
        "encodings": ["rope"],
    }


def _lightning(options: Options, index: int) -> dict[str, Any]:
    return {
        "kind": "lightning",
        "heads": options.count("num_attention_heads"),
        "head_dim": parts.head_dim(options),
        "slopes": slopes(options.count("num_attention_heads"), index, options.count("num_hidden_layers")),
        "norm": {"kind": "rms", "eps": 1e-6},  # whatever the config says of other norms
    }


def slopes(heads: int, layer: int, layers: int) -> list[float]:
    """The decay rates of the heads in a layer. With 8 heads, each rate is half of the previous one. Rates are lower in
    later layers (section 2.2 of the paper), but always above 0."""
    depth = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return [2 ** (-8 * (head + 1) / heads) * depth for head in range(heads)]


def _moe(options: Options) -> dict[str, Any]:
    return {
        "kind": "moe",
        "experts": options.count("num_local_experts"),
        "top_k": options["num_experts_per_tok"],
        "hidden": options["intermediate_size"],
    }


def _factors(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    """The alpha and beta factors of each kind, from its first sub-layer."""
    first: dict[str, Residual] = {}
    for layer in layers:
        node: Any = layer.mixer or layer.ffn
        first.setdefault(node.kind, layer.residual)
    known = {name: first[kind] for name, kind in FACTORS.items() if kind in first}
    alphas = {f"{name}_alpha_factor": residual.keep for name, residual in known.items()}
    return alphas | {f"{name}_beta_factor": residual.add for name, residual in known.items()}


def _mixer_config(reader: Reader) -> dict[str, Any]:
    attention, unit = reader.find("attention"), reader.find("lightning")
    sizes = {"num_attention_heads": unit.heads, "head_dim": unit.head_dim} if unit else {}
    if attention is None:
        return sizes
    turned = {"rope_parameters": rope_parameters(reader.encoding("rope"), THETA)}
    return {**sizes, **parts.attention_sizes(attention), "sliding_window": attention.window, **turned}


def _slope_rate(options: Options, layer: int) -> Tensor:
    """[heads, 1, 1]"""
    rates = slopes(options.count("num_attention_heads"), layer, options.count("num_hidden_layers"))
    return torch.tensor(rates, dtype=torch.float64)[:, None, None]


def _block(options: Options) -> Tensor:
    """The positions in a block, counted from 1: [block, 1]."""
    return torch.arange(1, options.count("block_size") + 1, dtype=torch.float64)[:, None]


def _query_decay(options: Options, layer: int) -> Tensor:
    """[heads, block, 1]"""
    return torch.exp(-_slope_rate(options, layer) * _block(options))


def _key_decay(options: Options, layer: int) -> Tensor:
    """[heads, block, 1]"""
    return torch.exp(-_slope_rate(options, layer) * (options.count("block_size") - _block(options)))


def _diagonal_decay(options: Options, layer: int) -> Tensor:
    """[1, heads, block, block]"""
    into = _block(options)
    return torch.exp(-_slope_rate(options, layer) * (into - into.T)).tril()[None]


COMPUTED = {
    "slope_rate": _slope_rate,
    "query_decay": _query_decay,
    "key_decay": _key_decay,
    "diagonal_decay": _diagonal_decay,
}
