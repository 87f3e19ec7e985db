"""Zamba2 (arXiv 2411.15242; the idea is Zamba's, arXiv 2405.16712): Mamba-2 layers. Before some of them runs a block of
attention and a feed-forward network. A few such blocks take turns. The output of a block is added only to the input of
the Mamba-2, not to the stream. Each use of a block has its own low-rank maps."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fusiontree.branches import Mamba2
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError
from fusiontree.fusions import Inject
from fusiontree.zoo import parts
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options, rope_parameters, rope_theta
from fusiontree.zoo.tensors import Part, Renamed, below, linear

GATED_EPS = 1e-5
"""Epsilon of Mamba-2's gated norm; the config's epsilon is for the other norms."""
KINDS = {"linear_attention": "mamba", "mamba": "mamba", "hybrid": "hybrid"}
"""Their words for layers, now and in first conversions, and ours."""
DEFAULTS = {
    "num_attention_heads": 32,
    "hidden_act": "gelu",
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "time_step_min": 0.001,
    "add_bias_linear": False,
    "num_mem_blocks": 1,
    "use_shared_attention_adapter": False,
    "adapter_rank": 128,
    "use_mem_rope": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@register
class Zamba2(Family):
    """Mamba-2 layers, and blocks that some layers share."""

    name = "zamba2"
    architecture = "Zamba2ForCausalLM"
    defaults = DEFAULTS

    def spec(self, options: Options) -> dict[str, Any]:
        _read_idle(options)
        norm, mamba, rope = parts.rms(options), _mamba(options), _rope(options)
        block, adapters = _block(options, norm, list(rope)), _adapters(options)
        layers: list[dict[str, Any]] = [{"mixer": mamba, "norm": norm}] * len(_kinds(options))
        for use in _uses(options):
            branch = {"kind": "use", "of": _name(use.block), "adapters": adapters}
            mixer = {"kind": "inject", "branches": {"block": branch}, "projection": {}, "norm": norm, "into": mamba}
            layers[use.layer] = {"mixer": mixer, "placement": "none"}
        blocks = sorted({use.block for use in _uses(options)})
        return {
            "vocab_size": options["vocab_size"],
            "width": options.count("hidden_size"),
            "encodings": rope if blocks else {},
            "shared": {_name(number): block for number in blocks},
            "layers": layers,
            "norm": norm,
            "head": {"tied": options["tie_word_embeddings"]},
        }

    def config(self, reader: Reader) -> dict[str, Any]:
        spec, rope = reader.spec, reader.encoding("rope")
        words = ["hybrid" if isinstance(layer.mixer, Inject) else "linear_attention" for layer in reader.layers]
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "num_hidden_layers": len(words),
            "layers_block_type": words,
            "rms_norm_eps": spec.norm.eps,
            "tie_word_embeddings": spec.head.tied,
            "use_mem_rope": rope is not None,
            "rope_parameters": rope_parameters(rope),
            "num_mem_blocks": max(1, len(spec.shared)),
            "pad_token_id": None,  # their class has a default, and would not train its embedding
            **_mamba_config(reader),
            **(_block_config(reader) if "hybrid" in words else {}),
        }

    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        yield from parts.whole(spec, "final_layernorm")
        for index, layer in enumerate(spec.expanded_layers()):
            yield from below(f"model.layers.{index}", f"layers.{index}", _layer_tensors(layer.mixer))
        for use in _uses_in(spec):
            block, ours = spec.shared[_name(use.block)], f"layers.{use.layer}.mixer.branches.block"
            yield from below(_place(use.first), f"{ours}.adapters", _adapter_tensors(spec.node(ours), block, use.index))
            if use.layer == use.first:
                yield from below(_place(use.first), f"shared.{_name(use.block)}", _block_tensors(block))

    def copies(self, spec: ModelSpec) -> Mapping[str, str]:
        """A block also has names in each further layer that uses it, with all of its adapters. A tied head is the
        embedding."""
        names = [name for part in self.tensors(spec) for name in part.names()]
        found = {"lm_head.weight": "model.embed_tokens.weight"} if spec.head.tied else {}
        for use in _uses_in(spec):
            inside = (
                name.removeprefix(_place(use.first)) for name in names if name.startswith(f"{_place(use.first)}.")
            )
            if use.layer != use.first:
                found |= {f"{_place(use.layer)}{name}": f"{_place(use.first)}{name}" for name in inside}
        return found


def _layer_tensors(mixer: NodeSpec | None) -> Iterator[Renamed]:
    match mixer:
        case Mamba2():
            yield Renamed("input_layernorm.weight", ("norm.mixer.before.weight",))
            yield from below("mamba", "mixer", parts.mamba2(mixer))
        case Inject(into=Mamba2() as inner):
            yield from linear("linear", "mixer.projection")
            yield Renamed("mamba_decoder.input_layernorm.weight", ("mixer.norm.weight",))
            yield from below("mamba_decoder.mamba", "mixer.into", parts.mamba2(inner))


def _block_tensors(block: Any) -> Iterator[Renamed]:
    network = block.links["feed_forward"]
    yield Renamed("input_layernorm.weight", ("norms.attention.weight",))
    yield Renamed("pre_ff_layernorm.weight", ("norms.feed_forward.weight",))
    for name in ("q", "k", "v"):
        yield from linear(f"self_attn.{name}_proj", f"links.attention.{name}")
    yield from linear("self_attn.o_proj", "links.out.map")
    yield from linear("feed_forward.down_proj", "links.feed_forward.down", network.bias)
    for kind in ("weight", "bias") if network.bias else ("weight",):
        ours = tuple(f"links.feed_forward.{name}.{kind}" for name in ("gate", "up"))
        yield Renamed(f"feed_forward.gate_up_proj.{kind}", ours, (network.hidden,) * 2)


def _adapter_tensors(use: Any, block: Any, index: int) -> Iterator[Renamed]:
    """The adapters of one use. The list of adapters in each block has an entry for every use of any block."""
    for name, adapter in use.adapters.items():
        inside = "feed_forward.gate_up_proj" if name == "gate_up" else f"self_attn.linear_{name}"
        place, count = f"{inside}_adapter_list.{index}", len(adapter.maps)
        yield Renamed(f"{place}.0.weight", (f"{name}.down.weight",))
        ups = tuple(f"{name}.up.{number}.weight" for number in range(count))
        yield Renamed(f"{place}.1.weight", ups, (block.links["feed_forward"].hidden,) * count)


def _read_idle(options: Options) -> None:
    """Pass over keys that transformers ignores; check sizes that follow from other keys and that old configs repeat."""
    for key in ("chunk_size", "use_mem_eff_path", "use_conv_bias", "time_step_max", "time_step_floor"):
        options.get(key, None)
    options.only("time_step_limit", None)  # dt is cut to `time_step_min` alone
    width, heads = options.count("hidden_size"), options.count("num_attention_heads")
    options.only("attention_hidden_size", 2 * width)
    options.only("kv_channels", width // heads)
    options.only("num_query_groups", heads)
    uses = _uses(options)
    options.only("hybrid_layer_ids", [use.layer for use in uses])
    if any(use.layer != use.first for use in uses):
        options.only("tie_word_embeddings", True)  # else transformers 5 shares no block, unlike older versions


def _name(block: int) -> str:
    """The name of a block in `shared`."""
    return f"block{block}"


class BlockUse(NamedTuple):
    """One use of a block: its layer, the number of earlier uses of any block, the number of the block, and the layer of
    the block's first use, which names the block in transformers."""

    layer: int
    index: int
    block: int
    first: int


def _uses(options: Options) -> list[BlockUse]:
    """The uses of blocks, which take turns."""
    return _in_turns([kind == "hybrid" for kind in _kinds(options)], options.count("num_mem_blocks"))


def _uses_in(spec: ModelSpec) -> list[BlockUse]:
    return _in_turns([isinstance(layer.mixer, Inject) for layer in spec.expanded_layers()], len(spec.shared))


def _in_turns(hybrid: list[bool], blocks: int) -> list[BlockUse]:
    layers = [index for index, has_block in enumerate(hybrid) if has_block]
    return [BlockUse(layer, index, index % blocks, layers[index % blocks]) for index, layer in enumerate(layers)]


def _kinds(options: Options) -> list[str]:
    kinds = options.words("layers_block_type", KINDS)
    options.only("num_hidden_layers", len(kinds))
    return kinds


def _rope(options: Options) -> dict[str, Any]:
    """The rotation of the blocks' attention, if any. `use_long_context` is refused then. transformers 4 makes theta
    over 8 times as large, 5 changes only a length. The config does not say which version the model was trained with."""
    options.only("use_mem_rope", False, True)
    if not options["use_mem_rope"]:
        for key in ("rope_parameters", "rope_scaling", "rope_theta", "use_long_context"):
            options.get(key, None)
        return {}
    options.only("use_long_context", False)
    return {"rope": rope_theta(options)}


def _mamba(options: Options) -> dict[str, Any]:
    """Mamba-2; the size of a head follows from the inner width and the number of heads."""
    inner, heads = _inner(options), options.count("n_mamba_heads")
    if inner % heads:
        raise FusionTreeError(f"config.json: n_mamba_heads: {heads} heads do not divide {inner} features")
    options.only("mamba_headdim", inner // heads)
    groups, bias = options.count("mamba_ngroups"), options["add_bias_linear"]
    return {
        "kind": "mamba2",
        "heads": heads,
        "head_dim": inner // heads,
        "state": options["mamba_d_state"],
        "groups": groups,
        "conv": options["mamba_d_conv"],
        "dt_limit": (options["time_step_min"], None),
        "norm": {"kind": "rms", "eps": GATED_EPS, "groups": groups},
        "bias": bias,
        "out_bias": bias,
    }


def _inner(options: Options) -> int:
    return options.count("mamba_expand") * options.count("hidden_size")


def _hidden(options: Options) -> int:
    """The hidden size of the blocks' feed-forward networks."""
    return options.get("intermediate_size", 4 * options.count("hidden_size"))


def _block(options: Options, norm: dict[str, Any], encodings: list[str]) -> dict[str, Any]:
    """Attention over the stream and the embedding, then the feed-forward network; no residuals."""
    options.only("hidden_act", "gelu")
    width = options.count("hidden_size")
    bias, hidden = options["add_bias_linear"], _hidden(options)
    return {
        "kind": "chain",
        "embedding": True,
        "links": {
            "attention": _attention(options, encodings),
            "out": {"kind": "linear", "outputs": width},
            "feed_forward": {"kind": "mlp", "activation": "geglu", "hidden": hidden, "bias": bias},
        },
        "norms": {"attention": norm, "feed_forward": norm},
    }


def _attention(options: Options, encodings: list[str]) -> dict[str, Any]:
    heads = options.count("num_attention_heads")
    head_dim = 2 * options.count("hidden_size") // heads
    options.only("attention_head_dim", head_dim)
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": options.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "scale": (head_dim / 2) ** -0.5,
        "project": False,
        "encodings": encodings,
    }


def _adapters(options: Options) -> dict[str, Any]:
    rank = options.count("adapter_rank")
    return {name: {"maps": maps, "rank": rank} for name, maps in _adapted(options).items()}


def _adapted(options: Options) -> dict[str, list[str]]:
    """The maps of a block that each use adapts, by the name of the adapter."""
    feed_forward = {"gate_up": ["links.feed_forward.gate", "links.feed_forward.up"]}
    options.only("use_shared_attention_adapter", False, True)
    if not options["use_shared_attention_adapter"]:
        return feed_forward
    heads, width = options.count("num_attention_heads"), options.count("hidden_size")
    if 2 * width % heads or options.get("num_key_value_heads", heads) != heads:
        text = f"needs as many key-value heads as there are heads, and a number that divides {2 * width}"
        raise FusionTreeError(f"config.json: use_shared_attention_adapter: {text}")
    return {name: [f"links.attention.{name}"] for name in ("q", "k", "v")} | feed_forward


def _mamba_config(reader: Reader) -> dict[str, Any]:
    mamba = reader.first("mamba2")
    return {
        "n_mamba_heads": mamba.heads,
        "mamba_d_state": mamba.state,
        "mamba_d_conv": mamba.conv,
        "mamba_ngroups": mamba.groups,
        "mamba_expand": parts.expand(reader, mamba.inner),
        "time_step_min": mamba.dt_limit[0],
        "add_bias_linear": mamba.bias,
    }


def _block_config(reader: Reader) -> dict[str, Any]:
    attention, use = reader.first("attention"), reader.first("use")
    ranks = [adapter.rank for adapter in use.adapters.values()]
    return {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "intermediate_size": reader.first("mlp").hidden,
        "hidden_act": "gelu",
        "use_shared_attention_adapter": "q" in use.adapters,
        "adapter_rank": ranks[0] if ranks else 1,
    }


def _place(layer: int) -> str:
    """The name of the block in a layer of transformers."""
    return f"model.layers.{layer}.shared_transformer"
