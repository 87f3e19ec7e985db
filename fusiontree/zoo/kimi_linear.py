"""Kimi Linear (arXiv 2510.26692): delta rules with one decay per channel, and latent attention in one layer of four.
There are no positions. After the first layer, layers have experts as in DeepSeek-V3."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fusiontree.branches import GatedDelta, Mla, Moe, SwiGLU
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError, suggest
from fusiontree.zoo import delta, llama, parts
from fusiontree.zoo.family import Config, Data, Family, Reader, register
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import Aliased, Concatenated, Part, Renamed, View, below, interleaved, linear, within

LATENT_EPS = 1e-6
"""Epsilon of the norms of latents; the config's epsilon is for the other norms."""
NETWORKS = {"dense": "mlp", "sparse": "moe"}
"""Their words for the network after a mixer, and ours."""
EXPERTS = "block_sparse_moe"
"""The name of a network of experts in files."""
ALIASES = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "n_group": "num_expert_group",
    "norm_topk_prob": "moe_renormalize",
}
"""The names of fields in transformers, and their names in published configs."""
OF_DELTA = {
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
"""The fields of `linear_attn_config` in the first configs, and their names in later configs."""
PLACES = {"kda_layers": delta.LINEAR, "full_attn_layers": delta.FULL}
DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "attention_bias": False,
    "linear_num_heads": 32,
    "linear_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "first_k_dense_replace": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "moe_intermediate_size": 1024,
    "num_shared_experts": 1,
    "moe_renormalize": True,
    "routed_scaling_factor": 2.446,
    "num_expert_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@register
class KimiLinear(Family):
    """A delta rule or latent attention, and a gated network or experts, in each layer."""

    name = "kimi_linear"
    architecture = "KimiLinearForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> Data:
        _read_idle(options)
        norm, mixers = parts.rms(options), {True: _attention(options), False: _mixer(options)}
        networks = {"moe": _moe(options), "mlp": {"kind": "swiglu", "hidden": options["intermediate_size"]}}
        layers = zip(_attends(options), _networks(options), strict=True)
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "layers": [{"mixer": mixers[attends], "ffn": networks[kind], "norm": norm} for attends, kind in layers],
            "norm": norm,
            "head": {"tied": False},
        }

    def config(self, reader: Reader) -> Data:
        mlp = reader.find("swiglu")
        kinds = ["sparse" if getattr(layer.ffn, "kind", None) == "moe" else "dense" for layer in reader.layers]
        return {
            **parts.sizes(reader),
            "layer_types": delta.layer_types(reader),
            "mlp_layer_types": kinds,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "pad_token_id": None,  # their class has a default that a small vocabulary lacks
            **({"intermediate_size": mlp.hidden} if mlp else {}),
            **_mixer_of(reader.find("gated_delta")),
            **_attention_of(reader.find("mla")),
            **_moe_of(reader.find("moe")),
        }

    def newest(self, config: Config) -> Data:
        """The config with `ALIASES` applied and `linear_attn_config` split into fields, as transformers does."""
        found = {ALIASES.get(key, key): value for key, value in config.items()}
        first = found.pop("linear_attn_config", None) or {}
        if not isinstance(first, Mapping):
            raise FusionTreeError(f"config.json: linear_attn_config: expected a mapping, found {first!r:.60}")
        for key, value in first.items():
            if key not in OF_DELTA and key not in PLACES:
                text = f"kimi_linear is not known to have it, found {value!r:.60}{suggest(key, [*OF_DELTA, *PLACES])}"
                raise FusionTreeError(f"config.json: linear_attn_config.{key}: {text}")
        found |= {key: first[name] for name, key in OF_DELTA.items() if name in first}
        if found.get("layer_types") is None and any(name in first for name in PLACES):
            found["layer_types"] = _types(first)
        return found

    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        yield from _tensors(spec, _node_tensors)

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        yield from _tensors(spec, _file_tensors)


def _tensors(spec: ModelSpec, inside: Callable[[NodeSpec], Iterator[Part]]) -> Iterator[Part]:
    yield from parts.whole(spec, "norm")
    yield from parts.layers(spec, llama.NORMS, inside)


def _node_tensors(node: NodeSpec) -> Iterator[Part]:
    match node:
        case GatedDelta():
            yield from within("self_attn", _delta_tensors("forget_gate."))
            yield from within("self_attn", _convolution(node))
        case Mla():
            yield from within("self_attn", _attention_tensors(node))
        case Moe():
            yield from within("mlp", _moe_tensors(parts.experts(node)))
        case SwiGLU():
            yield from within("mlp", parts.gated_mlp())


def _file_tensors(node: NodeSpec) -> Iterator[Part]:
    """The names in published files. When transformers saves, it gives dense networks the name of experts too."""
    match node:
        case GatedDelta():
            yield from within("self_attn", _delta_tensors(""))
            (whole,) = within("self_attn", _convolution(node))
            yield Concatenated(tuple(f"self_attn.{name}_conv1d.weight" for name in "qkv"), whole)
        case Moe():
            experts = parts.experts_apart(node, {"w1": "gate", "w3": "up", "w2": "down"})
            yield from within(EXPERTS, _moe_tensors(experts))
        case SwiGLU():
            for part in within("mlp", parts.gated_mlp()):
                yield Aliased(part, part.theirs.replace("mlp", EXPERTS))
        case _:
            yield from _node_tensors(node)


def _convolution(node: GatedDelta) -> Iterator[Renamed]:
    yield from parts.convolutions("conv1d", dict.fromkeys("qkv", node.heads * node.head_dim), bias=False)


def _delta_tensors(decays: str) -> Iterator[Renamed]:
    """All tensors but the convolution; `decays` is put in front of the names that belong to decays."""
    maps = {"q": "q", "k": "k", "v": "v", "b": "beta", "g_a": "z_down", "g_b": "z", "o": "out"}
    for theirs, ours in maps.items():
        yield from linear(f"{theirs}_proj", ours)
    yield from linear(f"{decays}f_a_proj", "dt_down")
    yield from linear(f"{decays}f_b_proj", "dt")
    yield Renamed(f"{decays}dt_bias", ("dt_bias",))
    heads = View(lambda tensor: tensor.flatten(), lambda tensor: tensor[None, None, :, None])
    yield Renamed(f"{decays}A_log", ("A_log",), view=heads)
    yield Renamed("o_norm.weight", ("norm.weight",))


def _attention_tensors(node: Mla) -> Iterator[Renamed]:
    """Rows are grouped by head. Queries: own channels, then those for the shared key. `kv_b_proj`: key, then value."""
    heads, own, shared, value = node.heads, node.head_dim, node.shared_dim, node.value_dim or node.head_dim
    asked = "q_proj" if node.query_rank is None else "q_b_proj"
    queries, keys_values = (heads * own, heads * shared), (heads * own, heads * value)
    yield Renamed(f"{asked}.weight", ("q.weight", "q_shared.weight"), queries, interleaved(heads, own, shared))
    if node.query_rank is not None:
        yield from linear("q_a_proj", "q_latent", node.bias)
        yield Renamed("q_a_layernorm.weight", ("q_latent_norm.weight",))
    for kind in ("weight", "bias") if node.bias else ("weight",):
        yield Renamed(f"kv_a_proj_with_mqa.{kind}", (f"latent.{kind}", f"shared.{kind}"), (node.rank, shared))
    yield Renamed("kv_a_layernorm.weight", ("latent_norm.weight",))
    yield Renamed("kv_b_proj.weight", ("k.weight", "v.weight"), keys_values, interleaved(heads, own, value))
    yield from linear("o_proj", "out", node.out_bias)


def _moe_tensors(experts: Iterator[Part]) -> Iterator[Part]:
    yield Renamed("gate.weight", ("router.weight",))
    yield Renamed("gate.e_score_correction_bias", ("correction",))
    yield from below("experts", "experts", experts)
    yield from below("shared_experts", "shared", parts.gated_mlp())


def _types(first: Mapping[str, Any]) -> list[str]:
    """The type of each layer, from lists of layers per type, counted from 1."""
    pairs = [(place, kind) for name, kind in PLACES.items() for place in _list(name, first.get(name))]
    kinds = dict(pairs)
    if len(kinds) < len(pairs) or set(kinds) != set(range(1, len(kinds) + 1)):
        text = f"{' and '.join(PLACES)} have to name every layer once, the first one is 1"
        raise FusionTreeError(f"config.json: linear_attn_config: {text}")
    return [kinds[place] for place in range(1, len(kinds) + 1)]


def _list(name: str, found: object) -> list[Any]:
    if not isinstance(found, list) or any(type(place) is not int for place in found):
        text = f"expected a list of whole numbers, found {found!r:.60}"
        raise FusionTreeError(f"config.json: linear_attn_config.{name}: {text}")
    return found


def _read_idle(options: Options) -> None:
    """Refuse unsupported values, and pass over keys that have no effect because nothing rotates."""
    options.only("hidden_act", "silu")
    options.only("tie_word_embeddings", False)
    options.only("mla_use_nope", True)
    options.only("moe_router_activation_func", "sigmoid")
    options.only("use_grouped_topk", True)
    options.only("moe_layer_freq", 1)
    options.only("num_nextn_predict_layers", 0)
    options.only("num_key_value_heads", options.count("num_attention_heads"))
    for key in ("head_dim", "qk_head_dim", "rope_theta", "rope_scaling", "rope_parameters", "model_max_length"):
        options.get(key, None)


def _attends(options: Options) -> list[bool]:
    return delta.attends(options, lambda index: index > 0 and index % 4 == 0)


def _networks(options: Options) -> list[str]:
    """The kind of each layer's network."""
    layers, dense = len(_attends(options)), options.count("first_k_dense_replace", 0)
    if options.get("mlp_layer_types", None) is None:
        return ["mlp" if index < dense else "moe" for index in range(layers)]
    kinds = options.words("mlp_layer_types", NETWORKS)
    if len(kinds) != layers:
        raise FusionTreeError(f"config.json: mlp_layer_types: {len(kinds)} are given, there are {layers} layers")
    return kinds


def _mixer(options: Options) -> Data:
    heads, head_dim = options.count("linear_num_heads"), options.count("linear_head_dim")
    return {
        "kind": "gated_delta",
        "heads": heads,
        "key_heads": heads,
        "head_dim": head_dim,
        "value_dim": head_dim,
        "conv": options["linear_conv_kernel_dim"],
        "decay": "channel",
        "decay_rank": head_dim,
        "norm": parts.rms(options),
        "gate": "sigmoid",
        "gate_rank": head_dim,
    }


def _attention(options: Options) -> Data:
    bias = options["attention_bias"]
    return {
        "kind": "mla",
        "heads": options.count("num_attention_heads"),
        "head_dim": options.count("qk_nope_head_dim"),
        "shared_dim": options.count("qk_rope_head_dim"),
        "value_dim": options.count("v_head_dim"),
        "rank": options.count("kv_lora_rank"),
        "query_rank": options.get("q_lora_rank", None),
        "norm": {"kind": "rms", "eps": LATENT_EPS},
        "bias": bias,
        "out_bias": bias,
    }


def _moe(options: Options) -> Data:
    hidden = options.count("moe_intermediate_size")
    return {
        "kind": "moe",
        "experts": options.count("num_experts"),
        "top_k": options["num_experts_per_token"],
        "hidden": hidden,
        "router": {
            "scores": "sigmoid",
            "renormalise": options["moe_renormalize"],
            "multiplier": options["routed_scaling_factor"],
            "correction": True,
            "groups": options["num_expert_group"],
            "top_groups": options["topk_group"],
        },
        "shared_hidden": hidden * options.count("num_shared_experts"),
    }


def _mixer_of(found: Any) -> Data:
    if found is None:
        return {}
    sizes = {"linear_head_dim": found.head_dim, "linear_num_heads": found.heads}
    return sizes | {"linear_conv_kernel_dim": found.conv}


def _attention_of(found: Any) -> Data:
    if found is None:
        return {}
    return {
        "num_attention_heads": found.heads,
        "num_key_value_heads": found.heads,
        "qk_nope_head_dim": found.head_dim,
        "qk_rope_head_dim": found.shared_dim,
        "v_head_dim": found.value_dim or found.head_dim,
        "kv_lora_rank": found.rank,
        "q_lora_rank": found.query_rank,
        "attention_bias": found.bias,
    }


def _moe_of(found: Any) -> Data:
    if found is None:
        return {}
    return {
        "num_experts": found.experts,
        "num_experts_per_token": found.top_k,
        "moe_intermediate_size": found.hidden,
        "num_shared_experts": max(1, (found.shared_hidden or 0) // found.hidden),
        "moe_renormalize": found.router.renormalise,
        "routed_scaling_factor": found.router.multiplier,
        "num_expert_group": found.router.groups,
        "topk_group": found.router.top_groups,
    }
