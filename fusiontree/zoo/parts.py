"""What many families have in common: names of tensors, and what a few options mean."""

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
    """The norm of all places."""
    return {"kind": "rms", "gain": gain, "eps": options[key]}


def layer_types(options: Options, known: Sequence[str], default: Callable[[int], str]) -> list[str]:
    """The type of each layer, from its index where the config says none."""
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
    """What every config says; `eps` is the name of the norms'."""
    spec = reader.spec
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": len(reader.layers),
        eps: spec.norm.eps,
        "tie_word_embeddings": spec.head.tied,
    }


def whole(spec: ModelSpec, final_norm: str, root: str = "model", embedding: str = "embed_tokens") -> Iterator[Renamed]:
    """Embedding, last norm and head."""
    yield Renamed(f"{root}.{embedding}.weight", ("embedding.weight",))
    yield Renamed(f"{root}.{final_norm}.weight", ("norm.weight",))
    if not spec.head.tied:
        yield Renamed("lm_head.weight", ("head.weight",))


def layers(
    spec: ModelSpec, norms: Mapping[str, str], inside: Callable[[NodeSpec], Iterator[PartT]], root: str = "model.layers"
) -> Iterator[Renamed | PartT]:
    """The norms before sub-layers, by the names that their modules have in a layer, and what stands inside.

    Args:
        norms: the name of the norm of each slot, "mixer" and "ffn".
        inside: the tensors of a node, theirs named from the layer and ours from the node.
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
"""The maps of a gated network, by their names."""


def gated_mlp(bias: bool = False) -> Iterator[Renamed]:
    """The maps of `mlp`."""
    for theirs, ours in GATED.items():
        yield from linear(theirs, ours, bias)


def experts(node: Moe, *, gate_up: str = "gate_up_proj", down: str = "down_proj") -> Iterator[Renamed]:
    """Stacked experts, gate and up in one."""
    yield Renamed(gate_up, ("gate", "up"), (node.hidden, node.hidden), dim=1)
    yield Renamed(down, ("down",))


def experts_apart(node: Moe, maps: Mapping[str, str]) -> Iterator[Stacked]:
    """Experts as modules of their own, whose maps are ours by these names."""
    for theirs, ours in maps.items():
        yield Stacked(tuple(f"{index}.{theirs}.weight" for index in range(node.experts)), ours)


def convolutions(theirs: str, rows: dict[str, int], bias: bool, ours: str = "conv") -> Iterator[Renamed]:
    """A depthwise convolution over channels that have one each with us."""
    yield Renamed(f"{theirs}.weight", tuple(f"{ours}.{name}.weight" for name in rows), tuple(rows.values()), TAPS)
    if bias:
        yield Renamed(f"{theirs}.bias", tuple(f"{ours}.{name}.bias" for name in rows), tuple(rows.values()))


def mamba2(node: Mamba2) -> Iterator[Renamed]:
    """Mamba-2 with one map in for z, x, B, C and dt."""
    rows = {"z": node.inner, "x": node.inner, "B": node.bc_width, "C": node.bc_width, "dt": node.heads}
    for kind in ("weight", "bias") if node.bias else ("weight",):
        yield Renamed(f"in_proj.{kind}", tuple(f"{name}.{kind}" for name in rows), tuple(rows.values()))
    yield from convolutions("conv1d", {name: rows[name] for name in ("x", "B", "C")}, node.conv_bias)
    yield from (Renamed(name, (name,)) for name in ("A_log", "D", "dt_bias"))
    if node.norm:
        yield Renamed("norm.weight", ("norm.weight",))
    yield from linear("out_proj", "out", node.out_bias)


def mamba1(node: Mamba1) -> Iterator[Renamed]:
    """Mamba with one map in for x and z, and one for dt, B and C."""
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
    """Channels of an attention head: the width's share, unless the config says it."""
    if options.get("head_dim", None) is not None:
        return options.count("head_dim")
    return options.count("hidden_size") // options.count("num_attention_heads")


def attention_sizes(found: Attention | None) -> dict[str, int]:
    """What configs say of an attention branch; nothing of None."""
    if found is None:
        return {}
    return {"num_attention_heads": found.heads, "num_key_value_heads": found.kv_heads, "head_dim": found.head_dim}


def dt_rank(options: Options, key: str) -> int:
    """The rank of dt; "auto" is a sixteenth of the width."""
    return math.ceil(options.count("hidden_size") / 16) if options[key] == "auto" else options.count(key)


def expand(reader: Reader, inner: int) -> int:
    """How many times the width a state-space model is wide.

    Raises:
        FusionTreeError: no whole number of times.
    """
    width = reader.spec.width
    if inner % width:
        text = f"state-space models are a multiple of the width {width} wide, found {inner}"
        raise FusionTreeError(f"layers: in {reader.family.name} {text}")
    return inner // width


def dt_limit(options: Options, key: str = "time_step_limit") -> list[float | None]:
    """What dt is cut to; infinity is no limit."""
    low, high = options.get(key, (0.0, float("inf")))
    return [low, None if high == float("inf") else high]


def time_step_limit(limit: tuple[float, float | None]) -> list[float]:
    """The reverse of `dt_limit`."""
    return [limit[0], float("inf") if limit[1] is None else limit[1]]
