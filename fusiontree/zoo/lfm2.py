"""LFM2 (arXiv 2511.23404): gated short convolutions, a few layers of attention, and SwiGLU behind RMS norms."""

from collections.abc import Iterator
from typing import Any

from fusiontree.branches import Attention, ShortConv, SwiGLU
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope_parameters, rope_theta
from fusiontree.zoo.tensors import TAPS, Renamed, linear, within

CONV, ATTENTION = TYPES = ("conv", "full_attention")
THETA = 1_000_000.0
OF_INITIALISATION = ("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")
DEFAULTS = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 12288,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}


@register
class Lfm2(Family):
    """A short convolution or attention, and a gated network, in each layer."""

    name = "lfm2"
    architecture = "Lfm2ForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        for key in OF_INITIALISATION:
            options.get(key, None)
        _said_twice(options)
        types, norm = _layer_types(options), parts.rms(options, "norm_eps")
        mixers = {CONV: _short_conv(options), ATTENTION: _attention(options)}
        ffn, rope = {"kind": "swiglu", "hidden": _hidden(options)}, rope_theta(options, THETA)
        options.only("theta", rope["theta"])
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "encodings": {"rope": rope} if ATTENTION in types else {},
            "layers": [{"mixer": mixers[each], "ffn": ffn, "norm": norm} for each in types],
            "norm": norm,
            "head": {"tied": _tied(options)},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        attention, conv = reader.find("attention"), reader.find("short_conv")
        kinds = [getattr(layer.mixer, "kind", None) for layer in reader.layers]
        names = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
        return {
            **parts.sizes(reader, "norm_eps"),
            "layer_types": [CONV if kind == "short_conv" else ATTENTION for kind in kinds],
            **({theirs: getattr(attention, ours) for ours, theirs in names.items()} if attention else {}),
            "conv_L_cache": conv.conv if conv else DEFAULTS["conv_L_cache"],
            "conv_bias": conv.bias if conv else False,
            "intermediate_size": reader.first("swiglu").hidden,
            "block_auto_adjust_ff_dim": False,
            "rope_parameters": rope_parameters(reader.encoding("rope"), THETA),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from parts.whole(spec, "embedding_norm")
        yield from parts.layers(spec, NORMS, _node_tensors)


NORMS = {"mixer": "operator_norm", "ffn": "ffn_norm"}


def _node_tensors(node: NodeSpec) -> Iterator[Renamed]:
    match node:
        case ShortConv():
            yield from within("conv", _conv_tensors(node))
        case Attention():
            yield from within("self_attn", _attention_tensors())
        case SwiGLU():
            for theirs, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items():
                yield from linear(f"feed_forward.{theirs}", ours)


def _conv_tensors(node: ShortConv) -> Iterator[Renamed]:
    names = ("B", "C", "x")
    for kind in ("weight", "bias") if node.bias else ("weight",):
        yield Renamed(f"in_proj.{kind}", tuple(f"{name}.{kind}" for name in names), (node.inner,) * 3)
    yield Renamed("conv.weight", ("conv.weight",), view=TAPS)
    if node.bias:
        yield Renamed("conv.bias", ("conv.bias",))
    yield from linear("out_proj", "out", node.bias)


def _said_twice(options: Options) -> None:
    """Check keys of published configs that transformers does not read: they must agree with keys that it reads."""
    width = options["hidden_size"]
    same = {"block_dim": width, "conv_dim": width, "conv_dim_out": width, "block_norm_eps": options["norm_eps"]}
    same |= {"num_heads": options.count("num_attention_heads"), "block_use_swiglu": True, "use_pos_enc": True}
    for key, value in same.items():
        options.only(key, value)


def _layer_types(options: Options) -> list[str]:
    """The type of each layer. `full_attn_idxs` lists layers with attention; without it, all have attention."""
    listed = options.get("full_attn_idxs", range(options["num_hidden_layers"]))
    return parts.layer_types(options, TYPES, lambda index: ATTENTION if index in listed else CONV)


def _short_conv(options: Options) -> dict[str, Any]:
    bias = {key: options["conv_bias"] for key in ("bias", "conv_bias", "out_bias")}
    return {"kind": "short_conv", "inner": options["hidden_size"], "conv": options["conv_L_cache"], **bias}


def _attention(options: Options) -> dict[str, Any]:
    heads = options.count("num_attention_heads")
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options["num_key_value_heads"],
        "head_dim": parts.head_dim(options),
        "qk_norm": parts.rms(options, "norm_eps"),
        "encodings": ["rope"],
    }


def _hidden(options: Options) -> int:
    """The given size or, if the config asks for it, 2/3 of it, times a factor, rounded up to a multiple."""
    hidden, factor = options.get("block_ff_dim", options["intermediate_size"]), options["block_ffn_dim_multiplier"]
    multiple = options["block_multiple_of"]
    if not options["block_auto_adjust_ff_dim"]:
        return hidden
    hidden = int(2 * hidden / 3)
    return hidden if factor is None else multiple * -(-int(factor * hidden) // multiple)


def _tied(options: Options) -> bool:
    return options.get("tie_embedding", options["tie_word_embeddings"])


def _attention_tensors() -> Iterator[Renamed]:
    for name in ("q", "k", "v"):
        yield from linear(f"{name}_proj", name)
    for name in ("q", "k"):
        yield Renamed(f"{name}_layernorm.weight", (f"{name}_norm.weight",))
    yield from linear("out_proj", "out")
