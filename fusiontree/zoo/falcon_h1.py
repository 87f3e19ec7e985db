"""Falcon-H1 (arXiv 2507.22448): each layer adds Mamba-2 and attention on one normed input to the stream, then a gated
feed-forward network; muP multipliers stand beside the weights."""

from collections.abc import Iterator
from typing import Any

from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import bamba, parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope_parameters, rope_theta
from fusiontree.zoo.tensors import Renamed

PACKED = ("z", "x", "B", "C", "dt")
"""The parts of their input map of Mamba-2, in its order; `ssm_multipliers` has the same order."""


DEFAULTS = {
    "tie_word_embeddings": False,
    "mamba_proj_bias": False,
    "projectors_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "mamba_d_ssm": 1024,
    "mamba_d_head": "auto",
    "mamba_conv_bias": True,
    "mamba_rms_norm": False,
    "mamba_norm_before_gate": True,
    "rms_norm_eps": 1e-5,
    **{f"{name}_multiplier": 1.0 for name in ("lm_head", "embedding", "key", "attention_in", "attention_out")},
    **{f"{name}_multiplier": 1.0 for name in ("ssm_in", "ssm_out")},
}


@register
class FalconH1(Family):
    """Two mixers side by side and one feed-forward network in each layer."""

    name = "falcon_h1"
    architecture = "FalconH1ForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu")
        options.only("mamba_use_mlp", True)
        for key in ("mamba_expand", "mlp_expansion_factor", "mamba_chunk_size"):
            options.get(key, None)  # said by other fields, or of no consequence for the function
        gate, down = options.get("mlp_multipliers", (1.0, 1.0))
        out = {"mamba": options["ssm_out_multiplier"], "attention": options["attention_out_multiplier"]}
        mixer = {
            "kind": "sum",
            "branches": {"mamba": _mamba(options), "attention": _attention(options)},
            "multipliers": {name: float(value) for name, value in out.items() if value != 1.0},
        }
        ffn = {"kind": "swiglu", "hidden": options["intermediate_size"], "bias": options["mlp_bias"]}
        ffn["multipliers"] = {"gate": float(gate), "down": float(down)}
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "embedding": {"multiplier": float(options["embedding_multiplier"])},
            "encodings": {"rope": rope_theta(options)},
            "layers": [
                {
                    "repeat": options["num_hidden_layers"],
                    "layers": [{"mixer": mixer, "ffn": ffn, "norm": parts.rms(options)}],
                }
            ],
            "norm": parts.rms(options),
            "head": {"tied": options["tie_word_embeddings"], "multiplier": float(options["lm_head_multiplier"])},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        spec, ffn, rope = reader.spec, reader.first("swiglu"), reader.encoding("rope")
        mixer, mamba, attention = reader.first("sum"), reader.first("mamba2"), reader.first("attention")
        return {
            **parts.sizes(reader),
            "intermediate_size": ffn.hidden,
            "hidden_act": "silu",
            **parts.attention_sizes(attention),
            "attention_bias": attention.bias,
            "mlp_bias": ffn.bias,
            "projectors_bias": mamba.out_bias,
            "mamba_proj_bias": mamba.bias,
            "mamba_d_ssm": mamba.inner,
            "mamba_n_heads": mamba.heads,
            "mamba_d_head": mamba.head_dim,
            "mamba_n_groups": mamba.groups,
            "mamba_d_state": mamba.state,
            "mamba_d_conv": mamba.conv,
            "mamba_conv_bias": mamba.conv_bias,
            "mamba_rms_norm": mamba.norm is not None,
            "mamba_norm_before_gate": mamba.norm is None or mamba.norm.order == "norm_first",
            "time_step_limit": parts.time_step_limit(mamba.dt_limit),
            "rope_parameters": rope_parameters(rope),
            "embedding_multiplier": spec.embedding.multiplier,
            "lm_head_multiplier": spec.head.multiplier,
            "mlp_multipliers": [ffn.multipliers.gate, ffn.multipliers.down],
            "attention_in_multiplier": attention.multipliers.input,
            "key_multiplier": attention.multipliers.key,
            "attention_out_multiplier": mixer.multipliers.get("attention", 1.0),
            "ssm_in_multiplier": mamba.multipliers.input,
            "ssm_multipliers": [getattr(mamba.multipliers, name) for name in PACKED],
            "ssm_out_multiplier": mixer.multipliers.get("mamba", 1.0),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from parts.whole(spec, "final_layernorm")
        yield from parts.layers(spec, bamba.NORMS, bamba.node_tensors)


def _mamba(options: Options) -> dict[str, Any]:
    times = dict(zip(PACKED, options.get("ssm_multipliers", (1.0,) * 5), strict=True))
    times = {"input": options["ssm_in_multiplier"], **times}
    norm = None
    if options["mamba_rms_norm"]:
        order = "norm_first" if options["mamba_norm_before_gate"] else "gate_first"
        norm = parts.rms(options) | {"groups": options["mamba_n_groups"], "order": order}
    options.get("mamba_norm_before_gate", None)
    return {
        "kind": "mamba2",
        "heads": options.count("mamba_n_heads"),
        "head_dim": _head_dim(options),
        "state": options["mamba_d_state"],
        "groups": options["mamba_n_groups"],
        "conv": options["mamba_d_conv"],
        "conv_bias": options["mamba_conv_bias"],
        "dt_limit": parts.dt_limit(options),
        "norm": norm,
        "bias": options["mamba_proj_bias"],
        "out_bias": options["projectors_bias"],
        "multipliers": {name: float(value) for name, value in times.items()},
    }


def _head_dim(options: Options) -> int:
    inner, given = options.get("mamba_d_ssm", None), options["mamba_d_head"]
    inner = options["mamba_expand"] * options["hidden_size"] if inner is None else inner
    head_dim = inner // options.count("mamba_n_heads")
    if given not in ("auto", head_dim):
        raise FusionTreeError(
            f"config.json: mamba_d_head: found {given!r}, mamba_d_ssm and mamba_n_heads say {head_dim}"
        )
    return head_dim


def _attention(options: Options) -> dict[str, Any]:
    heads, bias = options.count("num_attention_heads"), options["attention_bias"]
    times = {"input": options["attention_in_multiplier"], "key": options["key_multiplier"]}
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": parts.head_dim(options),
        "bias": bias,
        "out_bias": bias,
        "encodings": ["rope"],
        "multipliers": {name: float(value) for name, value in times.items()},
    }
