"""Bamba (IBM, 2024; huggingface.co/blog/bamba): Mamba-2 in most layers, attention that rotates half of its channels in
some, a gated feed-forward network in each."""

from collections.abc import Iterator
from typing import Any

from fusiontree.branches import Attention, Mamba2, SwiGLU
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.layers import MAX_LAYERS
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, partial_parameters, partial_rope
from fusiontree.zoo.tensors import Renamed, within

MAMBA_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
"""Defaults of the options that `mamba` reads."""
DEFAULTS = MAMBA_DEFAULTS | {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@register
class Bamba(Family):
    """One mixer and one feed-forward network in each layer."""

    name = "bamba"
    architecture = "BambaForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu")
        options.get("z_loss_coefficient", None)  # of the loss
        norm, mixers = parts.rms(options), (mamba(options), _attention(options))
        ffn = {"kind": "swiglu", "hidden": options["intermediate_size"], "bias": options["mlp_bias"]}
        attends, rotation = _attends(options), _rope(options)
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "encodings": {"rope": rotation} if any(attends) else {},
            "layers": [{"mixer": mixers[there], "ffn": ffn, "norm": norm} for there in attends],
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"]},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        ffn, layers = reader.first("swiglu"), reader.layers
        return {
            **parts.sizes(reader),
            "attn_layer_indices": [index for index, layer in enumerate(layers) if isinstance(layer.mixer, Attention)],
            "intermediate_size": ffn.hidden,
            "mlp_bias": ffn.bias,
            "hidden_act": "silu",
            **_attention_config(reader),
            **mamba_config(reader),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from parts.whole(spec, "final_layernorm")
        yield from parts.layers(spec, NORMS, node_tensors)


NORMS = {"mixer": "input_layernorm", "ffn": "pre_ff_layernorm"}


def node_tensors(node: NodeSpec) -> Iterator[Renamed]:
    """The tensors of one node in a layer."""
    match node:
        case Attention():
            yield from within("self_attn", parts.attention(node))
        case Mamba2():
            yield from within("mamba", parts.mamba2(node))
        case SwiGLU():
            yield from within("feed_forward", parts.gated_mlp(node.bias))
        case _:
            pass


def _attends(options: Options) -> list[bool]:
    """Whether each layer has attention. MAX_LAYERS + 1 layers are enough for the spec to be refused."""
    places, layers = options.places("attn_layer_indices"), min(options.count("num_hidden_layers"), MAX_LAYERS + 1)
    return [index in places for index in range(layers)]


def _rope(options: Options) -> dict[str, Any]:
    """Rotates half of a head's channels, or the share in `rope_parameters`; any other share beside it is refused."""
    options.only("partial_rotary_factor", 0.5)
    head_dim = parts.head_dim(options)
    rope = partial_rope(options, head_dim, 0.5)
    options.only("attn_rotary_emb", rope["dim"] or head_dim)  # says the same in first conversions
    return rope


def _attention(options: Options) -> dict[str, Any]:
    heads, bias = options.count("num_attention_heads"), options["attention_bias"]
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": parts.head_dim(options),
        "bias": bias,
        "out_bias": bias,
        "encodings": ["rope"],
    }


def mamba(options: Options) -> dict[str, Any]:
    """The Mamba-2 of Bamba and of Granite, with one norm per group after the gate."""
    options.get("mamba_chunk_size", None)  # of no consequence for the function
    groups, bias = options.count("mamba_n_groups"), options["mamba_proj_bias"]
    return {
        "kind": "mamba2",
        "heads": options.count("mamba_n_heads"),
        "head_dim": _mamba_head_dim(options),
        "state": options["mamba_d_state"],
        "groups": groups,
        "conv": options["mamba_d_conv"],
        "conv_bias": options["mamba_conv_bias"],
        "dt_limit": parts.dt_limit(options),
        "norm": parts.rms(options) | {"groups": groups},
        "bias": bias,
        "out_bias": bias,
    }


def _mamba_head_dim(options: Options) -> int:
    """The size of a head, from `mamba_expand`; `mamba_d_head` must agree."""
    inner, heads = options.count("mamba_expand") * options.count("hidden_size"), options.count("mamba_n_heads")
    if inner % heads:
        raise FusionTreeError(f"config.json: mamba_n_heads: {heads} heads do not divide {inner} features")
    options.only("mamba_d_head", "auto", inner // heads)
    return inner // heads


def mamba_config(reader: Reader) -> dict[str, Any]:
    """The options that `mamba` reads; only `mamba_n_heads` if no layer has Mamba-2."""
    found = reader.find("mamba2")
    if found is None:
        return {"mamba_n_heads": 1}  # transformers needs a number that divides the width
    return {
        "mamba_expand": parts.expand(reader, found.inner),
        "mamba_n_heads": found.heads,
        "mamba_d_head": found.head_dim,
        "mamba_n_groups": found.groups,
        "mamba_d_state": found.state,
        "mamba_d_conv": found.conv,
        "mamba_conv_bias": found.conv_bias,
        "mamba_proj_bias": found.bias,
        "time_step_limit": parts.time_step_limit(found.dt_limit),
    }


def _attention_config(reader: Reader) -> dict[str, Any]:
    attention, rotation = reader.find("attention"), reader.encoding("rope")
    if attention is None:
        return {}
    return {
        **parts.attention_sizes(attention),
        "attention_bias": attention.bias,
        "rope_parameters": partial_parameters(rotation, attention.head_dim),
    }
