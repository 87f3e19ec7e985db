"""Falcon-H1 (arXiv 2507.22448) as a spec, and the weights of transformers' `FalconH1ForCausalLM` as ours.

Each layer adds Mamba-2 and attention on one normed input to the stream, then a gated feed-forward network. The muP
multipliers that transformers keeps beside its weights all scale linear maps, so they are folded into the maps; those
of the embedding and of the logits stay in the spec. The function is the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fusiontree.core.model_spec import ModelSpec
from fusiontree.errors import FusionTreeError

Config = Mapping[str, Any]
"""The fields of transformers' `FalconH1Config`, as `to_dict` gives them."""


def spec_of(config: Config) -> ModelSpec:
    """The spec of a Falcon-H1 configuration.

    Raises:
        FusionTreeError: it asks for what the family's published models do not have.
    """
    rope = config["rope_parameters"]
    for name, found, allowed in [
        ("hidden_act", config["hidden_act"], "silu"),
        ("rope_parameters.rope_type", rope.get("rope_type", "default"), "default"),
    ]:
        if found != allowed:
            raise FusionTreeError(f"falcon_h1: {name}: found {found!r}, only {allowed!r} is known")
    layer = {
        "mixer": {"kind": "sum", "branches": {"mamba": _mamba(config), "attention": _attention(config)}},
        "ffn": {"kind": "swiglu", "hidden": config["intermediate_size"], "bias": config["mlp_bias"]},
        "norm": _norm(config),
    }
    return ModelSpec.parse(
        {
            "format": 1,
            "vocab_size": config["vocab_size"],
            "width": config["hidden_size"],
            "embedding": {"multiplier": config["embedding_multiplier"]},
            "encodings": {"rope": {"kind": "rope", "theta": rope["rope_theta"]}},
            "layers": [{"repeat": config["num_hidden_layers"], "layers": [layer]}],
            "norm": _norm(config),
            "head": {"tied": config["tie_word_embeddings"], "multiplier": config["lm_head_multiplier"]},
        }
    )


def _norm(config: Config) -> dict[str, Any]:
    return {"kind": "rms", "gain": "weight", "eps": config["rms_norm_eps"]}


def _mamba(config: Config) -> dict[str, Any]:
    order = "norm_first" if config["mamba_norm_before_gate"] else "gate_first"
    low, high = config["time_step_limit"]
    return {
        "kind": "mamba2",
        "heads": config["mamba_n_heads"],
        "head_dim": config["mamba_d_head"],
        "state": config["mamba_d_state"],
        "groups": config["mamba_n_groups"],
        "conv": config["mamba_d_conv"],
        "conv_bias": config["mamba_conv_bias"],
        "dt_limit": [low, None if high == float("inf") else high],
        "norm": _norm(config) | {"groups": config["mamba_n_groups"], "order": order}
        if config["mamba_rms_norm"]
        else None,
        "bias": config["mamba_proj_bias"],
        "out_bias": config["projectors_bias"],
    }


def _attention(config: Config) -> dict[str, Any]:
    return {
        "kind": "attention",
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "bias": config["attention_bias"],
        "out_bias": config["attention_bias"],
        "encodings": ["rope"],
    }


def weights_of(config: Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the spec's model, from that of transformers."""
    found = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.final_layernorm.weight"],
    }
    if not config["tie_word_embeddings"]:
        found["head.weight"] = weights["lm_head.weight"]
    for index in range(config["num_hidden_layers"]):
        theirs = _within(weights, f"model.layers.{index}.")
        found |= {f"layers.{index}.{name}": value for name, value in _layer(config, theirs)}
    return found


def _within(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _layer(config: Config, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "norm.mixer.before.weight", theirs["input_layernorm.weight"]
    yield "norm.ffn.before.weight", theirs["pre_ff_layernorm.weight"]
    gate, down = config["mlp_multipliers"]
    yield from _scaled("ffn.gate", _within(theirs, "feed_forward.gate_proj."), gate)
    yield from _scaled("ffn.up", _within(theirs, "feed_forward.up_proj."))
    yield from _scaled("ffn.down", _within(theirs, "feed_forward.down_proj."), down)
    for name, value in _attention_weights(config, _within(theirs, "self_attn.")):
        yield f"mixer.branches.attention.{name}", value
    for name, value in _mamba_weights(config, _within(theirs, "mamba.")):
        yield f"mixer.branches.mamba.{name}", value


def _scaled(
    name: str, linear: Mapping[str, Tensor], output: float = 1.0, inputs: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """A linear map whose input and output are multiplied: the weight takes both, the bias that of the output."""
    yield f"{name}.weight", linear["weight"] * (output * inputs)
    if "bias" in linear:
        yield f"{name}.bias", linear["bias"] * output


def _attention_weights(config: Config, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    inputs = config["attention_in_multiplier"]
    yield from _scaled("q", _within(theirs, "q_proj."), inputs=inputs)
    yield from _scaled("k", _within(theirs, "k_proj."), config["key_multiplier"], inputs)
    yield from _scaled("v", _within(theirs, "v_proj."), inputs=inputs)
    yield from _scaled("out", _within(theirs, "o_proj."), config["attention_out_multiplier"])


def _mamba_weights(config: Config, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    inner, shared = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    rows = [inner, inner, shared, shared, config["mamba_n_heads"]]
    packed = {name: value.split(rows) for name, value in _within(theirs, "in_proj.").items()}
    for index, (name, output) in enumerate(zip(("z", "x", "B", "C", "dt"), config["ssm_multipliers"], strict=True)):
        part = {kind: values[index] for kind, values in packed.items()}
        if name == "dt":
            yield "dt_bias", theirs["dt_bias"] + part.pop("bias", torch.zeros(())) * output
        yield from _scaled(name, part, output, config["ssm_in_multiplier"])
    for kind, values in _within(theirs, "conv1d.").items():
        for name, value in zip(("x", "B", "C"), values.split(rows[1:4]), strict=True):
            yield f"conv.{name}.{kind}", value.squeeze(1) if kind == "weight" else value
    yield from ((name, theirs[name]) for name in ("A_log", "D"))
    if config["mamba_rms_norm"]:
        yield "norm.weight", theirs["norm.weight"]
    yield from _scaled("out", _within(theirs, "out_proj."), config["ssm_out_multiplier"])
