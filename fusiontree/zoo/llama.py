"""Llama (arXiv 2302.13971, 2407.21783) and Mistral (arXiv 2310.06825): attention and SwiGLU behind RMS norms."""

from collections.abc import Iterator
from typing import Any

from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope_parameters, rope_theta
from fusiontree.zoo.tensors import Same, below


def _spec(options: Options) -> dict[str, Any]:
    options.only("hidden_act", "silu")
    heads = options.count("num_attention_heads")
    bias = options.get("attention_bias", False)
    attention = {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": parts.head_dim(options),
        "window": options.get("sliding_window", None),
        "bias": bias,
        "out_bias": bias,
        "encodings": ["rope"],
    }
    ffn = {"kind": "swiglu", "hidden": options["intermediate_size"], "bias": options.get("mlp_bias", False)}
    layer = {"mixer": attention, "ffn": ffn, "norm": parts.rms(options)}
    return {
        "vocab_size": options["vocab_size"],
        "width": options.count("hidden_size"),
        "encodings": {"rope": rope_theta(options)},
        "layers": [{"repeat": options["num_hidden_layers"], "layers": [layer]}],
        "norm": parts.rms(options),
        "head": {"tied": options["tie_word_embeddings"]},
    }


def _config(reader: Reader) -> dict[str, Any]:
    spec, attention, ffn = reader.spec, reader.first("attention"), reader.first("swiglu")
    rope = reader.encoding("rope")
    found = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": len(reader.layers),
        **parts.attention_sizes(attention),
        "intermediate_size": ffn.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm.eps,
        "rope_parameters": rope_parameters(rope),
        "tie_word_embeddings": spec.head.tied,
    }
    if reader.family.name == "mistral":
        return {**found, "sliding_window": attention.window}
    return {**found, "attention_bias": attention.bias, "mlp_bias": ffn.bias}


def _tensors(options: Options) -> Iterator[Same]:
    yield from parts.whole(options, "norm")
    bias = options.get("attention_bias", False)
    for index in range(options["num_hidden_layers"]):
        theirs, ours = f"model.layers.{index}", f"layers.{index}"
        yield Same(f"{theirs}.input_layernorm.weight", (f"{ours}.norm.mixer.before.weight",))
        yield from below(f"{theirs}.self_attn", f"{ours}.mixer", parts.attention(bias, bias))
        yield Same(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.norm.ffn.before.weight",))
        yield from below(f"{theirs}.mlp", f"{ours}.ffn", parts.gated_mlp(options.get("mlp_bias", False)))


DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
LLAMA = register(Family("llama", "LlamaForCausalLM", _spec, _config, _tensors, DEFAULTS))
MISTRAL = register(
    Family(
        "mistral",
        "MistralForCausalLM",
        _spec,
        _config,
        _tensors,
        DEFAULTS | {"num_key_value_heads": 8},
    )
)
