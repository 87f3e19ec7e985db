"""Qwen3-Next without experts: Gated DeltaNet, and in one layer of four attention with an output gate; norms have a gain
of 1 + weight, a quarter of each attention head turns with the position."""

from collections.abc import Iterator
from typing import Any

from fusiontree.errors import FusionTreeError
from fusiontree.zoo import delta, parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, partial_parameters, partial_rope
from fusiontree.zoo.tensors import Same, below, interleaved, linear


def _spec(options: Options) -> dict[str, Any]:
    options.only("hidden_act", "silu")
    _refuse_experts(options)
    norm, attention, rope = parts.rms(options, gain="one_plus"), _attention(options), _rope(options)
    mixer = delta.mixer(options) | {"norm": parts.rms(options)}
    ffn = {"kind": "swiglu", "hidden": options["intermediate_size"]}
    kinds = [attention if attends else mixer for attends in _attends(options)]
    return {
        "vocab_size": options["vocab_size"],
        "width": options.count("hidden_size"),
        "encodings": {"rope": rope} if attention in kinds else {},
        "layers": [{"mixer": kind, "ffn": ffn, "norm": norm} for kind in kinds],
        "norm": norm,
        "head": {"tied": options["tie_word_embeddings"]},
    }


def _attends(options: Options) -> list[bool]:
    return delta.attends(options, delta.last_of(options.count("full_attention_interval")))


def _refuse_experts(options: Options) -> None:
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok", "norm_topk_prob"):
        options.get(key, None)  # says nothing of a model without experts
    options.get("router_aux_loss_coef", None)
    experts, period = options.count("num_experts", 0), options.count("decoder_sparse_step")
    dense = options.get("mlp_only_layers", [])
    sparse = (n for n in range(len(_attends(options))) if n not in dense and (n + 1) % period == 0)
    layer = next(sparse, None)
    if experts and layer is not None:
        text = f"qwen3_next is known with 0, layer {layer} would have more"
        raise FusionTreeError(f"config.json: num_experts: found {experts}, {text}")


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


def _config(reader: Reader) -> dict[str, Any]:
    spec, ffn, rope = reader.spec, reader.first("swiglu"), reader.encoding("rope")
    found = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": len(reader.layers),
        "intermediate_size": ffn.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm.eps,
        "num_experts": 0,
        "layer_types": delta.layer_types(reader),
        "tie_word_embeddings": spec.head.tied,
        **delta.attention_of(reader.find("attention")),
        **delta.mixer_of(reader.find("gated_delta")),
    }
    if rope:
        found["rope_parameters"] = partial_parameters(rope, reader.first("attention").head_dim)
    return found


def _tensors(options: Options) -> Iterator[Same]:
    yield from parts.whole(options, "norm")
    for index, attends in enumerate(_attends(options)):
        theirs, ours = f"model.layers.{index}", f"layers.{index}"
        yield Same(f"{theirs}.input_layernorm.weight", (f"{ours}.norm.mixer.before.weight",))
        yield Same(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.norm.ffn.before.weight",))
        if attends:
            yield from below(f"{theirs}.self_attn", f"{ours}.mixer", _attention_tensors(options))
        else:
            yield from below(f"{theirs}.linear_attn", f"{ours}.mixer", _mixer_tensors(options))
        yield from below(f"{theirs}.mlp", f"{ours}.ffn", parts.gated_mlp(bias=False))


def _attention_tensors(options: Options) -> Iterator[Same]:
    """Each head of theirs has its query, then its gate."""
    bias, heads, head_dim = options["attention_bias"], options.count("num_attention_heads"), options.count("head_dim")
    for kind in ("weight", "bias") if bias else ("weight",):
        each = (heads * head_dim,) * 2
        yield Same(f"q_proj.{kind}", (f"q.{kind}", f"gate.{kind}"), each, interleaved(heads, head_dim, head_dim))
    for theirs, ours in (("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out")):
        yield from linear(theirs, ours, bias)
    yield from (Same(f"{name}_norm.weight", (f"{name}_norm.weight",)) for name in ("q", "k"))


def _mixer_tensors(options: Options) -> Iterator[Same]:
    """Each key head of theirs has its query, its key, and the values and gates that fall to it."""
    rows, groups = delta.rows(options), options.count("linear_num_key_heads")
    for theirs, names in (("in_proj_qkvz", ("q", "k", "v", "z")), ("in_proj_ba", ("beta", "dt"))):
        own = tuple(rows[name] for name in names)
        view = interleaved(groups, *(count // groups for count in own))
        yield Same(f"{theirs}.weight", tuple(f"{name}.weight" for name in names), own, view)
    yield from parts.convolutions("conv1d", {name: rows[name] for name in ("q", "k", "v")}, bias=False)
    yield from (Same(name, (name,)) for name in ("A_log", "dt_bias", "norm.weight"))
    yield from linear("out_proj", "out")


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
    "num_experts": 512,
    "decoder_sparse_step": 1,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN3_NEXT = register(Family("qwen3_next", "Qwen3NextForCausalLM", _spec, _config, _tensors, DEFAULTS, parts.tied_head))
