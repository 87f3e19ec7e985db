"""Granite 4 (IBM, 2025; transformers' `granitemoehybrid`): Bamba's Mamba-2 or attention, then a gated feed-forward
network, in some models with experts beside it; muP multipliers on embedding, attention, residuals and logits."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from fusiontree.branches import Attention, Mamba2, Moe, SwiGLU
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.layers import MAX_LAYERS
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import llama, parts
from fusiontree.zoo.bamba import MAMBA_DEFAULTS, mamba, mamba_config
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope_parameters, rope_theta
from fusiontree.zoo.tensors import Part, Renamed, below, within

KINDS = {
    **{"linear_attention": "mamba", "mamba": "mamba"},
    **{"full_attention": "attention", "attention": "attention"},
}
"""Their words for mixers, now and in first conversions, and ours."""
DEFAULTS = MAMBA_DEFAULTS | {
    "num_attention_heads": 32,
    "attention_bias": False,
    "intermediate_size": 11008,
    "shared_intermediate_size": 1024,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "position_embedding_type": None,
    **{f"{name}_multiplier": 1.0 for name in ("embedding", "residual", "attention")},
    "logits_scaling": 1.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@register
class GraniteMoeHybrid(Family):
    """A mixer and a network for all tokens, with experts beside it if there are any, in each layer."""

    name = "granitemoehybrid"
    architecture = "GraniteMoeHybridForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu")
        options.only("normalization_function", "rmsnorm")
        for key in ("router_aux_loss_coef", "init_method"):
            options.get(key, None)  # of the loss, of initialisation
        norm, made, kinds = (
            parts.rms(options),
            {"mamba": mamba(options), "attention": _attention(options)},
            _kinds(options),
        )
        shared = {"ffn": _ffn(options), "norm": norm, "residual": {"add": options["residual_multiplier"]}}
        rope = rope_theta(options)
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "embedding": {"multiplier": options["embedding_multiplier"]},
            "encodings": {"rope": rope} if _rotates(options) and "attention" in kinds else {},
            "layers": [{"mixer": made[kind], **shared} for kind in kinds],
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"], "multiplier": 1 / options.number("logits_scaling")},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        spec, layer = reader.spec, reader.layers[0]
        kinds = [
            "full_attention" if isinstance(each.mixer, Attention) else "linear_attention" for each in reader.layers
        ]
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "num_hidden_layers": len(kinds),
            "layer_types": kinds,
            "hidden_act": "silu",
            "rms_norm_eps": spec.norm.eps,
            "tie_word_embeddings": spec.head.tied,
            "embedding_multiplier": spec.embedding.multiplier,
            "residual_multiplier": layer.residual.add,
            "logits_scaling": _divisor(spec.head.multiplier),
            **_ffn_config(reader),
            **_attention_config(reader),
            **mamba_config(reader),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        names = {"router": "router.weight", "gate_up": "experts.gate_up_proj", "down": "experts.down_proj"}
        yield from _tensors(spec, names)

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        names = {"router": "router.layer.weight", "gate_up": "input_linear.weight", "down": "output_linear.weight"}
        yield from _tensors(spec, names)


def _tensors(spec: ModelSpec, names: Mapping[str, str]) -> Iterator[Part]:
    yield from parts.whole(spec, "norm")
    yield from parts.layers(spec, llama.NORMS, partial(_node_tensors, names))


def _node_tensors(names: Mapping[str, str], node: NodeSpec) -> Iterator[Part]:
    match node:
        case Attention():
            yield from within("self_attn", parts.attention(node))
        case Mamba2():
            yield from within("mamba", parts.mamba2(node))
        case SwiGLU():
            yield from within("shared_mlp", _network(node.hidden))
        case Moe():
            yield from below("shared_mlp", "shared", _network(node.shared_hidden or 0))
            yield Renamed(f"block_sparse_moe.{names['router']}", ("router.weight",))
            experts = parts.experts(node, gate_up=names["gate_up"], down=names["down"])
            yield from below("block_sparse_moe", "experts", experts)


def _network(hidden: int) -> Iterator[Renamed]:
    yield Renamed("input_linear.weight", ("gate.weight", "up.weight"), (hidden, hidden))
    yield Renamed("output_linear.weight", ("down.weight",))


def _kinds(options: Options) -> list[str]:
    """The mixer of each layer; Mamba where the config says nothing."""
    layers = options.count("num_hidden_layers")
    if options.get("layer_types", None) is None:
        return ["mamba"] * min(layers, MAX_LAYERS + 1)  # enough for the spec to be refused
    kinds = options.words("layer_types", KINDS)
    options.only("num_hidden_layers", len(kinds))
    return kinds


def _rotates(options: Options) -> bool:
    options.only("position_embedding_type", "nope", "rope")
    return options["position_embedding_type"] == "rope"


def _attention(options: Options) -> dict[str, Any]:
    heads, bias, scale = (
        options.count("num_attention_heads"),
        options["attention_bias"],
        options["attention_multiplier"],
    )
    head_dim = parts.head_dim(options)
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "scale": None if scale == head_dim**-0.5 else scale,
        "bias": bias,
        "out_bias": bias,
        "encodings": ["rope"] if _rotates(options) else [],
    }


def _ffn(options: Options) -> dict[str, Any]:
    """Experts with a softmax over the chosen, and a network for all tokens; without experts, only that network."""
    hidden, shared = options.get("intermediate_size", 1), options["shared_intermediate_size"]
    experts, top_k = options.count("num_local_experts", 0), options["num_experts_per_tok"]
    if not experts:
        return {"kind": "swiglu", "hidden": shared}
    return {"kind": "moe", "experts": experts, "top_k": top_k, "hidden": hidden, "shared_hidden": shared}


def _divisor(multiplier: float) -> float:
    """The number with this reciprocal. Of several, it has the fewest digits, as a person would write it."""
    near = 1 / multiplier if multiplier else math.inf
    candidates = [near, math.nextafter(near, 0.0), math.nextafter(near, math.inf)]
    exact = [value for value in candidates if value and 1 / value == multiplier]
    return min(exact, key=lambda value: len(repr(value)), default=near)


def _ffn_config(reader: Reader) -> dict[str, Any]:
    moe = reader.find("moe")
    if moe is None:
        return {"num_local_experts": 0, "shared_intermediate_size": reader.first("swiglu").hidden}
    return {
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.hidden,
        "shared_intermediate_size": moe.shared_hidden or 1,
    }


def _attention_config(reader: Reader) -> dict[str, Any]:
    attention, rope = reader.find("attention"), reader.encoding("rope")
    if attention is None:
        return {}
    turned = {"rope_parameters": rope_parameters(rope)} if rope else {}
    return {
        **parts.attention_sizes(attention),
        "attention_bias": attention.bias,
        "attention_multiplier": attention.scale or attention.head_dim**-0.5,
        "position_embedding_type": "rope" if rope else None,
        **turned,
    }
