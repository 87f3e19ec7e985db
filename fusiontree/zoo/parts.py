"""What many families share: names of tensors, and the meaning of a few options."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fusiontree.branches import Attention, Mamba1, Mamba2, Moe
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError
from fusiontree.zoo.family import Reader
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import TAPS, PartT, Renamed, Stacked, below, linear


def rms(options: Options, key: str = "rms_norm_eps", gain: str = "weight") -> dict[str, Any]:
    """An RMS norm; `key` is the option of its epsilon."""
    return {"kind": "rms", "gain": gain, "eps": options[key]}


def layer_types(options: Options, known: Sequence[str], default: Callable[[int], str]) -> list[str]:
    """The type of each layer; `default` gives it from the index if the config has no `layer_types`."""
    found = options.get("layer_types", None) or [default(index) for index in range(options["num_hidden_layers"])]
    if len(found) != options["num_hidden_layers"]:
        text = f"found {len(found)} layers, num_hidden_layers says {options['num_hidden_layers']}"
        raise FusionTreeError(f"config.json: layer_types: {text}")
    for each in found:
        if each not in known:
            text = f"found {each!r}, {options.family} is known with {' and '.join(map(repr, known))}"
            raise FusionTreeError(f"config.json: layer_types: {text}")
    return found


def sizes(reader: Reader, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The options that every config has; `eps` is the name of the norms' epsilon."""
    spec = reader.spec
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": len(reader.layers),
        eps: spec.norm.eps,
        "tie_word_embeddings": spec.head.tied,
    }


def whole(spec: ModelSpec, final_norm: str, root: str = "model", embedding: str = "embed_tokens") -> Iterator[Renamed]:
    """Embedding, last norm and, unless tied, head."""
    yield Renamed(f"{root}.{embedding}.weight", ("embedding.weight",))
    yield Renamed(f"{root}.{final_norm}.weight", ("norm.weight",))
    if not spec.head.tied:
        yield Renamed("lm_head.weight", ("head.weight",))


def layers(
    spec: ModelSpec, norms: Mapping[str, str], inside: Callable[[NodeSpec], Iterator[PartT]], root: str = "model.layers"
) -> Iterator[Renamed | PartT]:
    """The norms before sub-layers and the tensors of all nodes in layers.

    Args:
        norms: for each slot, "mixer" or "ffn", the name of its norm in a layer of theirs.
        inside: the tensors of a node: their names start at the layer, our names start at the node.
    """
    for path, node in spec.nodes():
        top, index, *below_layer = path.split(".")
        if top == "layers":
            if len(below_layer) == 1:
                (slot,) = below_layer
                yield Renamed(f"{root}.{index}.{norms[slot]}.weight", (f"layers.{index}.norm.{slot}.before.weight",))
            yield from below(f"{root}.{index}", path, inside(node))


def attention(node: Attention) -> Iterator[Renamed]:
    """The maps of `self_attn`."""
    for name in ("q", "k", "v"):
        yield from linear(f"{name}_proj", name, node.bias)
    yield from linear("o_proj", "out", node.out_bias)


GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
"""The maps of a gated network: their names, and ours."""


def gated_mlp(bias: bool = False) -> Iterator[Renamed]:
    """The maps of `mlp`."""
    for theirs, ours in GATED.items():
        yield from linear(theirs, ours, bias)


def experts(node: Moe, *, gate_up: str = "gate_up_proj", down: str = "down_proj") -> Iterator[Renamed]:
    """Stacked experts, with gate and up in one tensor."""
    yield Renamed(gate_up, ("gate", "up"), (node.hidden, node.hidden), dim=1)
    yield Renamed(down, ("down",))


def experts_apart(node: Moe, maps: Mapping[str, str]) -> Iterator[Stacked]:
    """Experts that are separate modules; `maps` has their names of the maps, and ours."""
    for theirs, ours in maps.items():
        yield Stacked(tuple(f"{index}.{theirs}.weight" for index in range(node.experts)), ours)


def convolutions(theirs: str, rows: dict[str, int], bias: bool, ours: str = "conv") -> Iterator[Renamed]:
    """One depthwise convolution of theirs that holds several of ours; `rows` has the channels of each."""
    yield Renamed(f"{theirs}.weight", tuple(f"{ours}.{name}.weight" for name in rows), tuple(rows.values()), TAPS)
    if bias:
        yield Renamed(f"{theirs}.bias", tuple(f"{ours}.{name}.bias" for name in rows), tuple(rows.values()))


def mamba2(node: Mamba2) -> Iterator[Renamed]:
    """Mamba-2 whose input map holds z, x, B, C and dt."""
    rows = {"z": node.inner, "x": node.inner, "B": node.bc_width, "C": node.bc_width, "dt": node.heads}
    for kind in ("weight", "bias") if node.bias else ("weight",):
        yield Renamed(f"in_proj.{kind}", tuple(f"{name}.{kind}" for name in rows), tuple(rows.values()))
    yield from convolutions("conv1d", {name: rows[name] for name in ("x", "B", "C")}, node.conv_bias)
    yield from (Renamed(name, (name,)) for name in ("A_log", "D", "dt_bias"))
    if node.norm:
        yield Renamed("norm.weight", ("norm.weight",))
    yield from linear("out_proj", "out", node.out_bias)


def mamba1(node: Mamba1) -> Iterator[Renamed]:
    """Mamba with one map for x and z, and one map for dt, B and C."""
    for kind in ("weight", "bias") if node.bias else ("weight",):
        yield Renamed(f"in_proj.{kind}", (f"x.{kind}", f"z.{kind}"), (node.inner, node.inner))
    yield Renamed("conv1d.weight", ("conv.weight",), view=TAPS)
    if node.conv_bias:
        yield Renamed("conv1d.bias", ("conv.bias",))
    yield Renamed("x_proj.weight", ("dt_down.weight", "B.weight", "C.weight"), (node.rank, node.state, node.state))
    yield Renamed("dt_proj.weight", ("dt_up.weight",))
    yield Renamed("dt_proj.bias", ("dt_bias",))
    yield from (Renamed(name, (name,)) for name in ("A_log", "D"))
    yield from linear("out_proj", "out", node.out_bias)


def head_dim(options: Options) -> int:
    """Channels of an attention head: `head_dim`, else the width divided by the number of heads."""
    if options.get("head_dim", None) is not None:
        return options.count("head_dim")
    return options.count("hidden_size") // options.count("num_attention_heads")


def attention_sizes(found: Attention | None) -> dict[str, int]:
    """The options for the sizes of an attention branch; {} for None."""
    if found is None:
        return {}
    return {"num_attention_heads": found.heads, "num_key_value_heads": found.kv_heads, "head_dim": found.head_dim}


def dt_rank(options: Options, key: str) -> int:
    """The rank of dt; "auto" is a sixteenth of the width, rounded up."""
    return math.ceil(options.count("hidden_size") / 16) if options[key] == "auto" else options.count(key)


def expand(reader: Reader, inner: int) -> int:
    """The inner width of a state-space model divided by the width.

    Raises:
        FusionTreeError: the quotient is not a whole number.
    """
    width = reader.spec.width
    if inner % width:
        text = f"state-space models are a multiple of the width {width} wide, found {inner}"
        raise FusionTreeError(f"layers: in {reader.family.name} {text}")
    return inner // width


def dt_limit(options: Options, key: str = "time_step_limit") -> list[float | None]:
    """The bounds [low, high] of dt; a high bound of infinity becomes None, which is no limit."""
    low, high = options.get(key, (0.0, float("inf")))
    return [low, None if high == float("inf") else high]


def time_step_limit(limit: tuple[float, float | None]) -> list[float]:
    """The reverse of `dt_limit`."""
    return [limit[0], float("inf") if limit[1] is None else limit[1]]
