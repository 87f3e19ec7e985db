"""Gemma 2 (arXiv 2408.00118) and the text model of Gemma 3 (arXiv 2503.19786): norms before and after each sub-layer,
layers with a window between global ones.

Gemma 2 caps its scores and logits. Gemma 3 normalises queries and keys instead, and rotates them by another theta in
layers with a window.
"""

from collections.abc import Iterator
from typing import Any

from fusiontree.branches import Attention, Mlp
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope, rope_parameters, rope_theta
from fusiontree.zoo.tensors import Renamed, below, within

LOCAL, GLOBAL = TYPES = ("sliding_attention", "full_attention")
THETA = {LOCAL: ("rope_local_base_freq", 10_000.0), GLOBAL: ("rope_theta", 1_000_000.0)}
"""Theta in Gemma 3 by the type of a layer: its key in configs before transformers 5, and its default."""
ROPE = {LOCAL: "local_rope", GLOBAL: "global_rope"}
"""The names of Gemma 3's encodings by the type of a layer."""
NORMS = {
    "input_layernorm": "mixer.before",
    "post_attention_layernorm": "mixer.after",
    "pre_feedforward_layernorm": "ffn.before",
    "post_feedforward_layernorm": "ffn.after",
}
DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "final_logit_softcapping": None,
}
CAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}


class Gemma(Family):
    """The tensors of Gemma 2 and Gemma 3."""

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from parts.whole(spec, "norm")
        for index in range(len(spec.expanded_layers())):
            norms = ((theirs, f"layers.{index}.norm.{ours}.weight") for theirs, ours in NORMS.items())
            yield from (Renamed(f"model.layers.{index}.{theirs}.weight", (ours,)) for theirs, ours in norms)
        for path, node in spec.nodes():
            yield from below(f"model.layers.{path.split('.')[1]}", path, _node_tensors(node))


@register
class Gemma2(Gemma):
    """Gemma 2, with caps on scores and logits."""

    name = "gemma2"
    architecture = "Gemma2ForCausalLM"
    defaults = DEFAULTS | CAPS

    def spec(self, options: Options) -> dict[str, Any]:
        types = parts.layer_types(options, TYPES, lambda index: TYPES[index % 2])
        data = _spec(options, [(_attention(options, each), "rope") for each in types])
        return data | {"encodings": {"rope": rope_theta(options)}}

    def config(self, reader: Reader) -> dict[str, Any]:
        softcap = reader.first("attention").softcap
        parameters = rope_parameters(reader.encoding("rope"))
        return {**_config(reader), "attn_logit_softcapping": softcap, "rope_parameters": parameters}


@register
class Gemma3(Gemma):
    """Gemma 3, with norms on queries and keys."""

    name = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        every = options.get("sliding_window_pattern", 6)
        if options.get("layer_types", None) is not None:
            options.get("_sliding_window_pattern", None)  # `layer_types` was made from it
        types = parts.layer_types(options, TYPES, lambda index: LOCAL if (index + 1) % every else GLOBAL)
        qk_norm = {"qk_norm": _norm(options)}
        data = _spec(options, [(_attention(options, each) | qk_norm, ROPE[each]) for each in types])
        ropes = {ROPE[each]: found for each, found in _ropes(options).items() if each in types}
        return data | {"encodings": ropes}

    def config(self, reader: Reader) -> dict[str, Any]:
        ropes: dict[str, Any] = {each: reader.spec.encodings.get(ROPE[each]) for each in TYPES}
        parameters = {each: rope_parameters(found, THETA[each][1]) for each, found in ropes.items()}
        return {**_config(reader), "rope_parameters": parameters}


def _node_tensors(node: NodeSpec) -> Iterator[Renamed]:
    match node:
        case Attention():
            yield from within("self_attn", parts.attention(node))
            for name in ("q_norm", "k_norm") if node.qk_norm else ():
                yield Renamed(f"self_attn.{name}.weight", (f"{name}.weight",))
        case Mlp():
            yield from within("mlp", parts.gated_mlp())


def _ropes(options: Options) -> dict[str, dict[str, Any]]:
    """Gemma 3's rotations by the type of a layer. Before transformers 5, a scaling is for global layers only."""
    found = options.get("rope_parameters", None) or {GLOBAL: options.get("rope_scaling", None)}
    thetas = {each: options.get(*THETA[each]) for each in TYPES}
    return {each: rope(options, found.get(each) or {}, thetas[each]) for each in TYPES}


def _spec(options: Options, mixers: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """A model of these attention branches, each with the name of its rotation."""
    options.only("hidden_activation", "gelu_pytorch_tanh")
    options.get("hidden_act", None)  # transformers does not read it
    ffn = {"kind": "mlp", "hidden": options["intermediate_size"], "activation": "geglu_tanh"}
    around = {"ffn": ffn, "norm": _norm(options), "placement": "sandwich"}
    return {
        "vocab_size": options["vocab_size"],
        "width": options.count("hidden_size"),
        "embedding": {"multiplier": options["hidden_size"] ** 0.5},
        "layers": [{"mixer": mixer | {"encodings": [name]}, **around} for mixer, name in mixers],
        "norm": _norm(options),
        "head": {"tied": options["tie_word_embeddings"], "softcap": options["final_logit_softcapping"]},
    }


def _norm(options: Options) -> dict[str, Any]:
    return parts.rms(options, gain="one_plus")


def _attention(options: Options, kind: str) -> dict[str, Any]:
    head_dim, scalar = options["head_dim"], options["query_pre_attn_scalar"]
    bias, window = options["attention_bias"], options["sliding_window"]
    options.only("sliding_window_size", window)  # in published configs; transformers does not read it
    return {
        "kind": "attention",
        "heads": options.count("num_attention_heads"),
        "kv_heads": options["num_key_value_heads"],
        "head_dim": head_dim,
        "window": window if kind == LOCAL else None,
        "softcap": options.get("attn_logit_softcapping", None),
        "scale": None if scalar == head_dim else scalar**-0.5,
        "bias": bias,
        "out_bias": bias,
    }


def _config(reader: Reader) -> dict[str, Any]:
    """The options that Gemma 2 and Gemma 3 share."""
    spec, attention, ffn = reader.spec, reader.first("attention"), reader.first("mlp")
    windows = [getattr(layer.mixer, "window", None) for layer in reader.layers]
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": len(reader.layers),
        "layer_types": [GLOBAL if window is None else LOCAL for window in windows],
        "sliding_window": next((window for window in windows if window is not None), DEFAULTS["sliding_window"]),
        **parts.attention_sizes(attention),
        "query_pre_attn_scalar": max(1, round(attention.scale**-2)) if attention.scale else attention.head_dim,
        "attention_bias": attention.bias,
        "intermediate_size": ffn.hidden,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": spec.norm.eps,
        "tie_word_embeddings": spec.head.tied,
        "final_logit_softcapping": spec.head.softcap,
    }
