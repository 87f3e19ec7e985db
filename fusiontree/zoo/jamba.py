"""Jamba (arXiv 2403.19887, 2408.12570): attention without positions in one layer of a period, Mamba with norms on dt, B
and C in the others. Each layer has a gated feed-forward network, with experts in one layer of another period."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fusiontree.branches import Attention, Mamba1, Moe, SwiGLU
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.layers import MAX_LAYERS
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import bamba, parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import Part, Renamed, below, linear, within

DEFAULTS = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_expand": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_dt_rank": "auto",
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@register
class Jamba(Family):
    """A mixer and a network, or experts, in each layer."""

    name = "jamba"
    architecture = "JambaForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu")
        options.only("mamba_inner_layernorms", True)
        options.get("router_aux_loss_coef", None)  # of the loss
        norm, mixers, ffns = parts.rms(options), (_mamba(options), _attention(options)), (_mlp(options), _moe(options))
        layers = zip(_attends(options), _routes(options), strict=True)
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "layers": [{"mixer": mixers[attends], "ffn": ffns[routes], "norm": norm} for attends, routes in layers],
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"]},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        moe = reader.find("moe")
        ffn = moe or reader.first("swiglu")
        return {
            **parts.sizes(reader),
            "intermediate_size": ffn.hidden,
            "hidden_act": "silu",
            "num_experts": moe.experts if moe else 1,
            "num_experts_per_tok": moe.top_k if moe else 1,
            **_period_of("attn", [isinstance(layer.mixer, Attention) for layer in reader.layers]),
            **_period_of("expert", [isinstance(layer.ffn, Moe) for layer in reader.layers]),
            **parts.attention_sizes(reader.find("attention")),
            **_mamba_of(reader),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        yield from _tensors(spec, parts.experts)

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        yield from _tensors(spec, lambda node: parts.experts_apart(node, parts.GATED))


def _tensors(spec: ModelSpec, experts: Callable[[Moe], Iterator[Part]]) -> Iterator[Part]:
    yield from parts.whole(spec, "final_layernorm")
    yield from parts.layers(spec, bamba.NORMS, partial(_node_tensors, experts))


def _node_tensors(experts: Callable[[Moe], Iterator[Part]], node: NodeSpec) -> Iterator[Part]:
    match node:
        case Attention():
            yield from within("self_attn", parts.attention(node))
        case Mamba1():
            yield from within("mamba", parts.mamba1(node))
            for name in ("dt", "B", "C"):
                yield Renamed(f"mamba.{name.lower()}_layernorm.weight", (f"norm.{name}.weight",))
        case Moe():
            yield from linear("feed_forward.router", "router")
            yield from below("feed_forward.experts", "experts", experts(node))
        case SwiGLU():
            yield from within("feed_forward", parts.gated_mlp())


def _attends(options: Options) -> list[bool]:
    """Whether each layer has attention."""
    return _in_period(options, "attn")


def _routes(options: Options) -> list[bool]:
    """Whether each layer has experts."""
    several = options.count("num_experts") > 1
    return [several and routes for routes in _in_period(options, "expert")]


def _in_period(options: Options, what: str) -> list[bool]:
    """Whether each layer is at the offset of its period. MAX_LAYERS + 1 layers are enough for a refusal."""
    period, offset = options.count(f"{what}_layer_period"), options.count(f"{what}_layer_offset", 0)
    layers = min(options.count("num_hidden_layers"), MAX_LAYERS + 1)
    return [index % period == offset for index in range(layers)]


def _mlp(options: Options) -> dict[str, Any]:
    return {"kind": "swiglu", "hidden": options["intermediate_size"]}


def _moe(options: Options) -> dict[str, Any]:
    """Experts with the scores of a softmax over all experts, not renormalised over the chosen."""
    return {
        "kind": "moe",
        "experts": options["num_experts"],
        "top_k": options["num_experts_per_tok"],
        "hidden": options["intermediate_size"],
        "router": {"renormalise": False},
    }


def _mamba(options: Options) -> dict[str, Any]:
    return {
        "kind": "mamba1",
        "inner": _inner(options),
        "state": options["mamba_d_state"],
        "rank": parts.dt_rank(options, "mamba_dt_rank"),
        "conv": options["mamba_d_conv"],
        "conv_bias": options["mamba_conv_bias"],
        "norm": parts.rms(options),
        "bias": options["mamba_proj_bias"],
        "out_bias": options["mamba_proj_bias"],
    }


def _inner(options: Options) -> int:
    return options.count("mamba_expand") * options.count("hidden_size")


def _attention(options: Options) -> dict[str, Any]:
    heads = options.count("num_attention_heads")
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": parts.head_dim(options),
    }


def _period_of(what: str, there: list[bool]) -> dict[str, Any]:
    """The offset and period of the true entries; the period exceeds the stack if there are fewer than two."""
    places = [index for index, stands in enumerate(there) if stands]
    offset = places[0] if places else len(there)
    period = places[1] - offset if len(places) > 1 else len(there) + 1
    return {f"{what}_layer_offset": offset, f"{what}_layer_period": period}


def _mamba_of(reader: Reader) -> dict[str, Any]:
    mamba = reader.find("mamba1")
    if mamba is None:
        return {}
    return {
        "mamba_expand": parts.expand(reader, mamba.inner),
        "mamba_d_state": mamba.state,
        "mamba_dt_rank": mamba.rank,
        "mamba_d_conv": mamba.conv,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
    }
