"""RecurrentGemma (arXiv 2404.07839), a Griffin (arXiv 2402.19427): RG-LRU, and in one layer of three attention with a
window, one key-value head, and rotations of half of each head."""

from collections.abc import Iterator
from typing import Any

import torch

from fusiontree.branches import Attention, Mlp, RgLru
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.layers import MAX_LAYERS
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, partial_parameters, partial_rope
from fusiontree.zoo.tensors import TAPS, Renamed, linear, within

RECURRENT, ATTENTION = TYPES = ("recurrent", "attention")
GATES = {"input_gate": "input_gate", "recurrent_gate": "recurrence_gate"}
DEFAULTS = {
    "num_attention_heads": 10,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "block_types": ["recurrent", "recurrent", "attention"],
    "attention_bias": False,
    "tie_word_embeddings": True,
}


@register
class RecurrentGemma(Family):
    """A recurrent unit or attention, and a gated network, in each layer."""

    name = "recurrent_gemma"
    architecture = "RecurrentGemmaForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_activation", "gelu_pytorch_tanh")
        options.only("embeddings_scale_by_sqrt_dim", True)
        for key in ("w_init_variance_scale", "final_w_init_variance_scale", "head_dim"):
            options.get(key, None)  # initialisation; head_dim always follows from other keys
        norm, rope = parts.rms(options, gain="one_plus"), _rope(options)
        ffn = {"kind": "mlp", "hidden": options.count("intermediate_size", 2) // 2, "activation": "geglu_tanh"}
        mixers = {RECURRENT: _unit(options), ATTENTION: _attention(options)}
        kinds = _kinds(options)
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "embedding": {"multiplier": _multiplier(options.count("hidden_size"))},
            "encodings": {"rope": rope} if ATTENTION in kinds else {},
            "layers": [{"mixer": mixers[kind], "ffn": ffn | {"bias": True}, "norm": norm} for kind in kinds],
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"], "softcap": options.number("logits_soft_cap")},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        spec, ffn, unit = reader.spec, reader.first("mlp"), reader.find("rglru")
        return {
            **parts.sizes(reader),
            "block_types": [ATTENTION if isinstance(each.mixer, Attention) else RECURRENT for each in reader.layers],
            "intermediate_size": 2 * ffn.hidden,
            "hidden_activation": "gelu_pytorch_tanh",
            "logits_soft_cap": spec.head.softcap,
            **({"num_attention_heads": unit.heads, "lru_width": unit.inner, "conv1d_width": unit.conv} if unit else {}),
            **_attention_config(reader),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from parts.whole(spec, "final_norm")
        yield from parts.layers(spec, NORMS, _node_tensors)


NORMS = {"mixer": "temporal_pre_norm", "ffn": "channel_pre_norm"}


def _node_tensors(node: NodeSpec) -> Iterator[Renamed]:
    match node:
        case Attention():
            yield from within("temporal_block", parts.attention(node))
        case RgLru():
            yield from within("temporal_block", _unit_tensors())
        case Mlp():
            yield from within("mlp_block", parts.gated_mlp(bias=True))


def _kinds(options: Options) -> list[str]:
    """The kind of each layer, by repeating the pattern. MAX_LAYERS + 1 layers are enough for a refusal."""
    pattern = options.words("block_types", {kind: kind for kind in TYPES})
    options.only("_block_types", options["block_types"])  # in first conversions; transformers 5 passes over it
    if not pattern:
        raise FusionTreeError("config.json: block_types: found an empty list")
    return [pattern[index % len(pattern)] for index in range(min(options.count("num_hidden_layers"), MAX_LAYERS + 1))]


def _multiplier(width: int) -> float:
    """The square root of the width, rounded to bfloat16. A model uses this value in every dtype."""
    return float(torch.tensor(width**0.5, dtype=torch.bfloat16))


def _head_dim(options: Options) -> int:
    return options.count("hidden_size") // options.count("num_attention_heads")


def _rope(options: Options) -> dict[str, Any]:
    """The rotation. A scaling is refused, as in transformers."""
    found = options.get("rope_parameters", None) or {}
    if found.get("rope_type", "default") != "default":
        text = f"found {found['rope_type']!r}, recurrent_gemma is known with 'default'"
        raise FusionTreeError(f"config.json: rope_parameters.rope_type: {text}")
    return partial_rope(options, _head_dim(options), options.get("partial_rotary_factor", 0.5))


def _unit(options: Options) -> dict[str, Any]:
    heads, inner = options.count("num_attention_heads"), options.get("lru_width", options["hidden_size"])
    if type(inner) is not int or inner % heads:
        raise FusionTreeError(f"config.json: lru_width: {heads} heads do not divide {inner!r:.60} channels")
    taps = options["conv1d_width"]
    return {
        "kind": "rglru",
        "heads": heads,
        "head_dim": inner // heads,
        "conv": taps,
        "bias": True,
        "out_bias": True,
    }


def _attention(options: Options) -> dict[str, Any]:
    heads = options.count("num_attention_heads")
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": _head_dim(options),
        "window": options["attention_window_size"],
        "bias": options["attention_bias"],
        "out_bias": True,
        "encodings": ["rope"],
    }


def _attention_config(reader: Reader) -> dict[str, Any]:
    found, rope = reader.find("attention"), reader.encoding("rope")
    if found is None:
        return {}
    return {
        "num_attention_heads": found.heads,
        "num_key_value_heads": found.kv_heads,
        "attention_window_size": found.window,
        "attention_bias": found.bias,
        "rope_parameters": partial_parameters(rope, found.head_dim),
    }


def _unit_tensors() -> Iterator[Renamed]:
    for theirs, ours in (("linear_x", "x"), ("linear_y", "z"), ("linear_out", "out")):
        yield from linear(theirs, ours, bias=True)
    yield Renamed("conv_1d.weight", ("conv.weight",), view=TAPS)
    yield Renamed("conv_1d.bias", ("conv.bias",))
    yield Renamed("rg_lru.recurrent_param", ("Lambda",))
    for theirs, ours in GATES.items():
        yield from (Renamed(f"rg_lru.{theirs}_{kind}", (f"{ours}.{kind}",)) for kind in ("weight", "bias"))
