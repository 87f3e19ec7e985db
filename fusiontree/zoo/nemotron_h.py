"""Nemotron-H (arXiv 2504.03624, 2508.14444): each layer is one sub-layer: Mamba-2, attention without positions, a
feed-forward network with relu2 or, in later models, experts."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fusiontree.branches import Attention, Mamba2, Mlp, Moe
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.layers import LayerSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import Part, Renamed, below, linear, within

KINDS = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp", "moe": "moe"}
"""Their words for layers, and ours."""
LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""The letters of `hybrid_override_pattern`."""
DEFAULTS = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "time_step_min": 0.001,
    "use_conv_bias": True,
    "use_bias": False,
    "layer_norm_epsilon": 1e-5,
}


@register
class NemotronH(Family):
    """One sub-layer in each layer."""

    name = "nemotron_h"
    architecture = "NemotronHForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        _read_idle(options)
        norm = parts.rms(options, "layer_norm_epsilon")
        made = {"mamba": _mamba(options, norm), "attention": _attention(options), "mlp": _mlp(options)}
        kinds = _kinds(options)
        if "moe" in kinds:
            made["moe"] = _moe(options)
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "layers": [{_slot(kind): made[kind], "norm": norm} for kind in kinds],
            "norm": norm,
            "head": {"tied": False},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        spec, mlp = reader.spec, reader.find("mlp")
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "layers_block_type": [_word(reader, index, layer) for index, layer in enumerate(reader.layers)],
            "layer_norm_epsilon": spec.norm.eps,
            "tie_word_embeddings": False,
            **({"intermediate_size": mlp.hidden, "mlp_bias": mlp.bias} if mlp else {}),
            **_moe_config(reader),
            **parts.attention_sizes(reader.find("attention")),
            **_mamba_config(reader),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        yield from _tensors(
            spec, "model", lambda node: iter([Renamed(f"{name}_proj", (name,)) for name in ("up", "down")])
        )

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        apart = {"up_proj": "up", "down_proj": "down"}
        yield from _tensors(spec, "backbone", lambda node: parts.experts_apart(node, apart))


NORMS = {"mixer": "norm", "ffn": "norm"}


def _tensors(spec: ModelSpec, root: str, experts: Callable[[Moe], Iterator[Part]]) -> Iterator[Part]:
    yield from parts.whole(spec, "norm_f", root, "embeddings")
    yield from parts.layers(spec, NORMS, partial(_node_tensors, experts), f"{root}.layers")


def _node_tensors(experts: Callable[[Moe], Iterator[Part]], node: NodeSpec) -> Iterator[Part]:
    match node:
        case Attention():
            yield from within("mixer", parts.attention(node))
        case Mamba2():
            yield from within("mixer", parts.mamba2(node))
        case Mlp():
            yield from within("mixer", _network(node.bias))
        case Moe():
            yield from linear("mixer.gate", "router")
            yield Renamed("mixer.gate.e_score_correction_bias", ("correction",))
            yield from below("mixer.experts", "experts", experts(node))
            yield from below("mixer.shared_experts", "shared", _network())


def _network(bias: bool = False) -> Iterator[Renamed]:
    for name in ("up", "down"):
        yield from linear(f"{name}_proj", name, bias)


def _read_idle(options: Options) -> None:
    """Refuse unsupported values, check keys that repeat others, and pass over keys that transformers ignores."""
    options.only("tie_word_embeddings", False)
    options.only("attention_bias", False)
    options.only("mamba_proj_bias", False)
    options.only("num_nextn_predict_layers", 0)
    for key, same in _SAID_TWICE.items():
        options.only(key, options[same])
    for key in _IDLE:
        options.get(key, None)


_IDLE = (
    *("expand", "chunk_size", "residual_in_fp32", "mamba_ssm_cache_dtype", "mtp_layers_block_type"),
    *("time_step_limit", "time_step_max", "time_step_floor"),  # dt is cut to `time_step_min` alone
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob"),
    *("moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size"),  # `_moe` reads them
    *("moe_shared_expert_overlap", "n_group", "topk_group"),
    *("partial_rotary_factor", "rope_theta", "rope_scaling", "rope_parameters"),  # nothing rotates
)
_SAID_TWICE = {
    "norm_eps": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
    "attention_head_dim": "head_dim",
}
"""Keys of published configs that transformers does not read, and the keys that they must agree with."""


def _kinds(options: Options) -> list[str]:
    """The kind of each layer, from words or, in first conversions, from letters."""
    if options.get("layers_block_type", None) is not None:
        options.get("hybrid_override_pattern", None)  # passed over by transformers too
        kinds = options.words("layers_block_type", KINDS)
    else:
        kinds = options.words("hybrid_override_pattern", LETTERS)
    options.only("num_hidden_layers", len(kinds))
    return kinds


def _slot(kind: str) -> str:
    return "ffn" if kind in ("mlp", "moe") else "mixer"


def _mamba(options: Options, norm: dict[str, Any]) -> dict[str, Any]:
    options.only("mamba_hidden_act", "silu")
    bias, groups = options["use_bias"], options["n_groups"]
    return {
        "kind": "mamba2",
        "heads": options["mamba_num_heads"],
        "head_dim": options["mamba_head_dim"],
        "state": options["ssm_state_size"],
        "groups": groups,
        "conv": options["conv_kernel"],
        "conv_bias": options["use_conv_bias"],
        "dt_limit": (options["time_step_min"], None),
        "norm": norm | {"groups": groups},
        "bias": bias,
        "out_bias": bias,
    }


def _attention(options: Options) -> dict[str, Any]:
    heads, head_dim = options["num_attention_heads"], options["head_dim"]
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": head_dim,
    }


def _mlp(options: Options) -> dict[str, Any]:
    options.only("mlp_hidden_act", "relu2")
    hidden, bias = options["intermediate_size"], options["mlp_bias"]
    return {"kind": "mlp", "activation": "relu2", "hidden": hidden, "bias": bias}


def _moe(options: Options) -> dict[str, Any]:
    """Experts with sigmoid scores, a correction that balances the choice, and a shared network for all tokens."""
    options.only("mlp_bias", False)
    options.only("moe_latent_size", None)
    return {
        "kind": "moe",
        "experts": options["n_routed_experts"],
        "top_k": options["num_experts_per_tok"],
        "hidden": options["moe_intermediate_size"],
        "activation": "relu2",
        "router": {
            "scores": "sigmoid",
            "renormalise": options["norm_topk_prob"],
            "multiplier": options["routed_scaling_factor"],
            "correction": True,
            "groups": options["n_group"],
            "top_groups": options["topk_group"],
        },
        "shared_hidden": options["moe_shared_expert_intermediate_size"],
    }


def _word(reader: Reader, index: int, layer: LayerSpec) -> str:
    """Their word for a layer."""
    if (layer.mixer is None) == (layer.ffn is None):
        text = f"{reader.family.name} has one sub-layer in a layer"
        raise FusionTreeError(f"layers.{index}: {text}, found {'none' if layer.mixer is None else 'two'}")
    words = {Mamba2: "linear_attention", Attention: "full_attention", Moe: "moe"}
    return words.get(type(layer.mixer or layer.ffn), "mlp")


def _moe_config(reader: Reader) -> dict[str, Any]:
    moe = reader.find("moe")
    if moe is None:
        return {}
    return {
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "moe_shared_expert_intermediate_size": moe.shared_hidden or 1,
        "norm_topk_prob": moe.router.renormalise,
        "routed_scaling_factor": moe.router.multiplier,
        "n_group": moe.router.groups,
        "topk_group": moe.router.top_groups,
    }


def _mamba_config(reader: Reader) -> dict[str, Any]:
    mamba = reader.find("mamba2")
    if mamba is None:
        return {}
    return {
        "mamba_num_heads": mamba.heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state,
        "n_groups": mamba.groups,
        "conv_kernel": mamba.conv,
        "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.bias,
        "time_step_min": mamba.dt_limit[0],
    }
