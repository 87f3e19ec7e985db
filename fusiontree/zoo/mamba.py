"""Mamba (arXiv 2312.00752) and FalconMamba (arXiv 2410.05355): nothing but Mamba mixers behind RMS norms, in
FalconMamba with norms without a gain on dt, B and C."""

from collections.abc import Iterator
from typing import Any

from fusiontree.branches import Mamba1
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import mamba2, parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import Renamed, within

FALCON = "falcon_mamba"


_OF_INITIALISATION = tuple(f"time_step_{what}" for what in ("min", "max", "floor", "scale", "init_scheme"))
DEFAULTS = {
    "expand": 2,
    "time_step_rank": "auto",
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


@register
class Mamba(Family):
    """One mixer in each layer."""

    name = "mamba"
    architecture = "MambaForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu", "swish")
        options.only("rms_norm", True)
        for key in ("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", *_OF_INITIALISATION):
            options.get(key, None)  # of no consequence for the function
        norm = parts.rms(options, "layer_norm_epsilon")
        width, layers = options["hidden_size"], options["num_hidden_layers"]
        for key, said in (("d_model", width), ("n_layer", layers), ("d_inner", _inner(options))):
            options.only(key, said)  # names of the authors' code, which first conversions kept beside the others
        return {
            "vocab_size": options["vocab_size"],
            "width": width,
            "layers": [{"repeat": layers, "layers": [{"mixer": _mixer(options), "norm": norm}]}],
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"]},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        mamba = reader.first("mamba1")
        found = {
            **parts.sizes(reader, "layer_norm_epsilon"),
            "intermediate_size": mamba.inner,
            "state_size": mamba.state,
            "time_step_rank": mamba.rank,
            "conv_kernel": mamba.conv,
            "use_bias": mamba.bias,
            "use_conv_bias": mamba.conv_bias,
            "hidden_act": "silu",
        }
        if reader.family.name == FALCON and mamba.norm:
            found["mixer_rms_eps"] = mamba.norm.eps
        return found

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from mamba2.backbone(spec)
        yield from parts.layers(spec, mamba2.NORMS, _node_tensors, "backbone.layers")


@register
class FalconMamba(Mamba):
    """Mamba with norms on dt, B and C."""

    name = FALCON
    architecture = "FalconMambaForCausalLM"
    defaults = DEFAULTS | {"mixer_rms_eps": 1e-6}


def _node_tensors(node: NodeSpec) -> Iterator[Renamed]:
    if isinstance(node, Mamba1):
        yield from within("mixer", parts.mamba1(node))


def _mixer(options: Options) -> dict[str, Any]:
    return {
        "kind": "mamba1",
        "inner": _inner(options),
        "state": options["state_size"],
        "rank": parts.dt_rank(options, "time_step_rank"),
        "conv": options["conv_kernel"],
        "conv_bias": options["use_conv_bias"],
        "norm": parts.rms(options, "mixer_rms_eps", "none") if options.family == FALCON else None,
        "bias": options["use_bias"],
        "out_bias": options["use_bias"],
    }


def _inner(options: Options) -> int:
    """`intermediate_size` or, if it is absent, `expand` times the width, as in transformers."""
    return options.get("intermediate_size", options.count("expand") * options.count("hidden_size"))
