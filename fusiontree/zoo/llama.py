"""Llama (arXiv 2302.13971, 2407.21783) and Mistral (arXiv 2310.06825): attention and SwiGLU behind RMS norms."""

from collections.abc import Iterator
from typing import Any

from fusiontree.branches import Attention, SwiGLU
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope_parameters, rope_theta
from fusiontree.zoo.tensors import Renamed, within

DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}


@register
class Llama(Family):
    """Attention and a gated network in each layer."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
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

    def config(self, reader: Reader) -> dict[str, Any]:
        attention, ffn = reader.first("attention"), reader.first("swiglu")
        rope = reader.encoding("rope")
        found = {
            **parts.sizes(reader),
            **parts.attention_sizes(attention),
            "intermediate_size": ffn.hidden,
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(rope),
        }
        if reader.family.name == "mistral":
            return {**found, "sliding_window": attention.window}
        return {**found, "attention_bias": attention.bias, "mlp_bias": ffn.bias}

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from parts.whole(spec, "norm")
        yield from parts.layers(spec, NORMS, node_tensors)


@register
class Mistral(Llama):
    """Llama with a window."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    defaults = DEFAULTS | {"num_key_value_heads": 8}


NORMS = {"mixer": "input_layernorm", "ffn": "post_attention_layernorm"}


def node_tensors(node: NodeSpec) -> Iterator[Renamed]:
    """The tensors of one node in a layer."""
    match node:
        case Attention():
            yield from within("self_attn", parts.attention(node))
        case SwiGLU():
            yield from within("mlp", parts.gated_mlp(node.bias))
