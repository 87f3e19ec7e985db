"""Qwen3-Next (Qwen, 2025): Gated DeltaNet, and in one layer of four attention with an output gate. Norms have a gain of
1 + weight. A quarter of the channels of an attention head rotates. A feed-forward network is plain, or has experts and
a gated network for all tokens."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fusiontree.branches import Attention, GatedDelta, Moe, SwiGLU
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import delta, llama, parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, partial_parameters, partial_rope
from fusiontree.zoo.tensors import Part, Renamed, below, interleaved, linear, within

DEFAULTS = {
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "intermediate_size": 5632,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@register
class Qwen3Next(Family):
    """A delta rule or attention, and experts or a gated network, in each layer."""

    name = "qwen3_next"
    architecture = "Qwen3NextForCausalLM"
    defaults = DEFAULTS
    unused = ("mtp.",)

    def spec(self, options: Options) -> dict[str, Any]:
        options.only("hidden_act", "silu")
        options.get("router_aux_loss_coef", None)  # of the loss
        norm, attention, rope = parts.rms(options, gain="one_plus"), _attention(options), _rope(options)
        mixer = delta.mixer(options) | {"norm": parts.rms(options)}
        ffns = {"kind": "swiglu", "hidden": options["intermediate_size"]}, _moe(options)
        kinds = [attention if attends else mixer for attends in _attends(options)]
        layers = zip(kinds, _routes(options), strict=True)
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "encodings": {"rope": rope} if attention in kinds else {},
            "layers": [{"mixer": kind, "ffn": ffns[routes], "norm": norm} for kind, routes in layers],
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"]},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        rope = reader.encoding("rope")
        found = {
            **parts.sizes(reader),
            "hidden_act": "silu",
            "layer_types": delta.layer_types(reader),
            **_ffn_config(reader),
            **delta.attention_of(reader.find("attention")),
            **delta.mixer_of(reader.find("gated_delta")),
        }
        if rope:
            found["rope_parameters"] = partial_parameters(rope, reader.first("attention").head_dim)
        return found

    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        yield from _tensors(spec, parts.experts)

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        yield from _tensors(spec, lambda node: parts.experts_apart(node, parts.GATED))


def _tensors(spec: ModelSpec, experts: Callable[[Moe], Iterator[Part]]) -> Iterator[Part]:
    yield from parts.whole(spec, "norm")
    yield from parts.layers(spec, llama.NORMS, partial(_node_tensors, experts))


def _node_tensors(experts: Callable[[Moe], Iterator[Part]], node: NodeSpec) -> Iterator[Part]:
    match node:
        case Attention():
            yield from within("self_attn", _attention_tensors(node))
        case GatedDelta():
            yield from within("linear_attn", _delta_tensors(node))
        case Moe():
            yield from linear("mlp.gate", "router")
            yield from below("mlp.experts", "experts", experts(node))
            yield from below("mlp.shared_expert", "shared", parts.gated_mlp())
            yield from linear("mlp.shared_expert_gate", "shared_gate")
        case SwiGLU():
            yield from within("mlp", parts.gated_mlp())


def _attention_tensors(node: Attention) -> Iterator[Renamed]:
    """The rows of `q_proj` are grouped by head: query, then gate."""
    view = interleaved(node.heads, node.head_dim, node.head_dim)
    for kind in ("weight", "bias") if node.bias else ("weight",):
        yield Renamed(f"q_proj.{kind}", (f"q.{kind}", f"gate.{kind}"), (node.heads * node.head_dim,) * 2, view)
    for theirs, ours in (("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out")):
        yield from linear(theirs, ours, node.bias)
    yield from (Renamed(f"{name}_norm.weight", (f"{name}_norm.weight",)) for name in ("q", "k"))


def _delta_tensors(node: GatedDelta) -> Iterator[Renamed]:
    """Rows are grouped by key head: query, key, values and gates in `in_proj_qkvz`, beta and dt in `in_proj_ba`."""
    rows = delta.rows(node)
    for theirs, names in (("in_proj_qkvz", ("q", "k", "v", "z")), ("in_proj_ba", ("beta", "dt"))):
        own = tuple(rows[name] for name in names)
        view = interleaved(node.key_heads, *(count // node.key_heads for count in own))
        yield Renamed(f"{theirs}.weight", tuple(f"{name}.weight" for name in names), own, view)
    yield from parts.convolutions("conv1d", {name: rows[name] for name in ("q", "k", "v")}, bias=False)
    yield from (Renamed(name, (name,)) for name in ("A_log", "dt_bias", "norm.weight"))
    yield from linear("out_proj", "out")


def _attends(options: Options) -> list[bool]:
    return delta.attends(options, delta.last_of(options.count("full_attention_interval")))


def _routes(options: Options) -> list[bool]:
    """Whether each layer has experts."""
    experts, period = options.count("num_experts", 0), options.count("decoder_sparse_step")
    dense = options.places("mlp_only_layers")
    layers = range(len(_attends(options)))
    return [experts > 0 and index not in dense and (index + 1) % period == 0 for index in layers]


def _moe(options: Options) -> dict[str, Any]:
    """Experts with softmax scores, and a network for all tokens with its own gate."""
    return {
        "kind": "moe",
        "experts": options.count("num_experts", 0),
        "top_k": options["num_experts_per_tok"],
        "hidden": options["moe_intermediate_size"],
        "router": {"renormalise": options["norm_topk_prob"]},
        "shared_hidden": options["shared_expert_intermediate_size"],
        "shared_gate": True,
    }


def _attention(options: Options) -> dict[str, Any]:
    bias = options["attention_bias"]
    return {
        "kind": "attention",
        "heads": options.count("num_attention_heads"),
        "kv_heads": options.count("num_key_value_heads"),
        "head_dim": options.count("head_dim"),
        "qk_norm": parts.rms(options, gain="one_plus"),
        "gate": True,
        "bias": bias,
        "out_bias": bias,
        "encodings": ["rope"],
    }


def _rope(options: Options) -> dict[str, Any]:
    return partial_rope(options, options.count("head_dim"), options.get("partial_rotary_factor", 0.25))


def _ffn_config(reader: Reader) -> dict[str, Any]:
    """The options of plain networks and of experts, if the spec has them."""
    plain, moe = reader.find("swiglu"), reader.find("moe")
    sizes = {"intermediate_size": plain.hidden} if plain else {}
    if moe is None:
        return sizes | {"num_experts": 0}
    return sizes | {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.renormalise,
        "moe_intermediate_size": moe.hidden,
        "shared_expert_intermediate_size": moe.shared_hidden or 1,
        "mlp_only_layers": [index for index, layer in enumerate(reader.layers) if not isinstance(layer.ffn, Moe)],
    }
