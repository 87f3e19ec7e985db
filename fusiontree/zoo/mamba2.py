"""Mamba-2 (arXiv 2405.21060): nothing but Mamba-2 mixers behind RMS norms."""

from collections.abc import Iterator
from typing import Any

from fusiontree.branches import Mamba2
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import Renamed, within

_IDLE = (
    *("expand", "chunk_size", "residual_in_fp32", "time_step_rank"),  # said by other fields, or of no consequence
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme"),
    "norm_before_gate",  # in transformers, the norm is always after the gate
)
DEFAULTS = {"use_bias": False, "tie_word_embeddings": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5}


@register
class Mamba2Family(Family):
    """One mixer in each layer."""

    name = "mamba2"
    architecture = "Mamba2ForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu", "swish")
        options.only("rms_norm", True)
        for key in _IDLE:
            options.get(key, None)
        inner = options.count("num_heads") * options.count("head_dim")
        options.only("intermediate_size", inner)  # transformers computes it from the other keys
        norm = parts.rms(options, "layer_norm_epsilon")
        mixer = {
            "kind": "mamba2",
            "heads": options["num_heads"],
            "head_dim": options["head_dim"],
            "state": options["state_size"],
            "groups": options["n_groups"],
            "conv": options["conv_kernel"],
            "conv_bias": options["use_conv_bias"],
            "dt_limit": parts.dt_limit(options),
            "norm": norm | {"groups": options["n_groups"]},
            "bias": options["use_bias"],
            "out_bias": options["use_bias"],
        }
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "layers": [{"repeat": options["num_hidden_layers"], "layers": [{"mixer": mixer, "norm": norm}]}],
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"]},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        mamba = reader.first("mamba2")
        return {
            **parts.sizes(reader, "layer_norm_epsilon"),
            "num_heads": mamba.heads,
            "head_dim": mamba.head_dim,
            "state_size": mamba.state,
            "n_groups": mamba.groups,
            "conv_kernel": mamba.conv,
            "expand": parts.expand(reader, mamba.inner),
            "use_bias": mamba.bias,
            "use_conv_bias": mamba.conv_bias,
            "hidden_act": "silu",
            "time_step_limit": parts.time_step_limit(mamba.dt_limit),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from backbone(spec)
        yield from parts.layers(spec, NORMS, _node_tensors, "backbone.layers")


NORMS = {"mixer": "norm"}


def backbone(spec: ModelSpec) -> Iterator[Renamed]:
    """Embedding, last norm and head, with the names of the Mamba families."""
    yield from parts.whole(spec, "norm_f", "backbone", "embeddings")


def _node_tensors(node: NodeSpec) -> Iterator[Renamed]:
    if isinstance(node, Mamba2):
        yield from within("mixer", parts.mamba2(node))
