"""OLMo-Hybrid: Gated DeltaNet with negative eigenvalues and norms before it. One layer of four has attention with norms
after it, norms over all queries and over all keys, with or without positions."""

from collections.abc import Iterator
from typing import Any

from fusiontree.branches import Attention, GatedDelta
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import delta, parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope_parameters, rope_theta
from fusiontree.zoo.tensors import Concatenated, Part, Renamed, below, linear, within

EPS = 1e-5
"""Epsilon of the norm after the delta rule; the config's epsilon is for the other norms."""


_OF_INITIALISATION = (*(f"linear_{what}" for what in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")),)
DEFAULTS = {
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
IN_FILES = {"input_layernorm": "attention_layer_norm", "post_attention_layernorm": "feedforward_layer_norm"}
PRE = "input_layernorm", "post_attention_layernorm"
POST = "post_attention_layernorm", "post_feedforward_layernorm"
PERIOD = 4


@register
class OlmoHybrid(Family):
    """A delta rule with norms before it or attention with norms after it, and a gated network, in each layer."""

    name = "olmo_hybrid"
    architecture = "OlmoHybridForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu")
        for key in _OF_INITIALISATION:
            options.get(key, None)  # of no consequence for the function
        norm, ffn = parts.rms(options), {"kind": "swiglu", "hidden": options["intermediate_size"]}
        encodings = _encodings(options)
        attention = {"mixer": _attention(options, list(encodings)), "ffn": ffn, "norm": norm, "placement": "post"}
        linear = {"mixer": _mixer(options), "ffn": ffn, "norm": norm}
        kinds = delta.attends(options, delta.last_of(PERIOD))
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "encodings": encodings if any(kinds) else {},
            "layers": [attention if attends else linear for attends in kinds],
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"]},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        ffn, rope = reader.first("swiglu"), reader.encoding("rope")
        attention, mixer = reader.first("attention"), reader.first("gated_delta")  # transformers needs both
        return {
            **parts.sizes(reader),
            "intermediate_size": ffn.hidden,
            "hidden_act": "silu",
            "layer_types": delta.layer_types(reader),
            "rope_parameters": rope_parameters(rope) if rope else {"rope_type": "default", "rope_theta": None},
            "linear_allow_neg_eigval": mixer.negative_eigenvalues,
            "pad_token_id": None,  # their class has a default that a small vocabulary lacks
            **delta.attention_of(attention),
            **delta.mixer_of(mixer),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from parts.whole(spec, "norm")
        for index, layer in enumerate(spec.expanded_layers()):
            theirs, ours = f"model.layers.{index}", f"layers.{index}"
            norms, place = (POST, "after") if layer.placement == "post" else (PRE, "before")
            for name, slot in zip(norms, ("mixer", "ffn"), strict=True):
                yield Renamed(f"{theirs}.{name}.weight", (f"{ours}.norm.{slot}.{place}.weight",))
            yield from below(theirs, f"{ours}.mixer", _mixer_tensors(layer.mixer))
            yield from below(f"{theirs}.mlp", f"{ours}.ffn", parts.gated_mlp())

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        """In files, norms of both kinds of layers have other names, and q, k and v have separate convolutions.
        (transformers writes three equal parts, even if q, k and v have different numbers of channels.)"""
        for part in self.tensors(spec):
            if part.theirs.endswith("conv1d.weight"):
                yield Concatenated(tuple(part.theirs.replace("conv1d", f"{name}_conv1d") for name in "qkv"), part)
            else:
                path, _, name = part.theirs.removesuffix(".weight").rpartition(".")
                yield part._replace(theirs=f"{path}.{IN_FILES[name]}.weight") if name in IN_FILES else part


def _mixer_tensors(node: NodeSpec | None) -> Iterator[Renamed]:
    match node:
        case Attention():
            yield from within("self_attn", parts.attention(node))
            yield from (Renamed(f"self_attn.{name}_norm.weight", (f"{name}_norm.weight",)) for name in ("q", "k"))
        case GatedDelta():
            yield from within("linear_attn", _delta_tensors(node))


def _delta_tensors(node: GatedDelta) -> Iterator[Renamed]:
    for theirs, ours in zip("qkvgbao", ("q", "k", "v", "z", "beta", "dt", "out"), strict=True):
        yield from linear(f"{theirs}_proj", ours)
    rows = delta.rows(node)
    yield from parts.convolutions("conv1d", {name: rows[name] for name in ("q", "k", "v")}, bias=False)
    yield from (Renamed(name, (name,)) for name in ("A_log", "dt_bias"))
    yield Renamed("o_norm.weight", ("norm.weight",))


def _encodings(options: Options) -> dict[str, Any]:
    """The rotation. A theta of null means no rotation; an absent theta has transformers' default."""
    found = options.get("rope_parameters", {})
    return {} if found.get("rope_theta", 1) is None else {"rope": rope_theta(options)}


def _mixer(options: Options) -> dict[str, Any]:
    own = {"negative_eigenvalues": options["linear_allow_neg_eigval"], "norm": {"kind": "rms", "eps": EPS}}
    return delta.mixer(options) | own


def _attention(options: Options, encodings: list[str]) -> dict[str, Any]:
    heads, bias = options.count("num_attention_heads"), options["attention_bias"]
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": parts.head_dim(options),
        "qk_norm": parts.rms(options) | {"over": "all"},
        "bias": bias,
        "out_bias": bias,
        "encodings": encodings,
    }
