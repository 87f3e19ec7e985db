"""What many families have in common: names of tensors, and what a few options mean."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fusiontree.branches import Attention
from fusiontree.errors import FusionTreeError
from fusiontree.zoo.family import Reader
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import TAPS, Same, Stacked, linear


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


def whole(options: Options, final_norm: str) -> Iterator[Same]:
    """Embedding, last norm and head."""
    yield Same("model.embed_tokens.weight", ("embedding.weight",))
    yield Same(f"model.{final_norm}.weight", ("norm.weight",))
    if not options["tie_word_embeddings"]:
        yield Same("lm_head.weight", ("head.weight",))


def attention(bias: bool, out_bias: bool) -> Iterator[Same]:
    """The maps of `self_attn`."""
    for name in ("q", "k", "v"):
        yield from linear(f"{name}_proj", name, bias)
    yield from linear("o_proj", "out", out_bias)


def gated_mlp(bias: bool) -> Iterator[Same]:
    """The maps of `mlp`."""
    for name in ("gate", "up", "down"):
        yield from linear(f"{name}_proj", name, bias)


def experts(hidden: int, *, gate_up: str = "gate_up_proj", down: str = "down_proj") -> Iterator[Same]:
    """Stacked experts, gate and up in one."""
    yield Same(gate_up, ("gate", "up"), (hidden, hidden), dim=1)
    yield Same(down, ("down",))


def experts_apart(count: int, names: tuple[str, ...]) -> Iterator[Stacked]:
    """Experts as modules of their own."""
    for name in names:
        yield Stacked(tuple(f"{index}.{name}_proj.weight" for index in range(count)), name)


def convolutions(theirs: str, rows: dict[str, int], bias: bool, ours: str = "conv") -> Iterator[Same]:
    """A depthwise convolution over channels that have one each with us."""
    yield Same(f"{theirs}.weight", tuple(f"{ours}.{name}.weight" for name in rows), tuple(rows.values()), TAPS)
    if bias:
        yield Same(f"{theirs}.bias", tuple(f"{ours}.{name}.bias" for name in rows), tuple(rows.values()))


def mamba2(
    inner: int, shared: int, heads: int, *, bias: bool, out_bias: bool, conv_bias: bool, norm: bool
) -> Iterator[Same]:
    """Mamba-2 with one map in for z, x, B, C and dt."""
    rows = {"z": inner, "x": inner, "B": shared, "C": shared, "dt": heads}
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Same(f"in_proj.{kind}", tuple(f"{name}.{kind}" for name in rows), tuple(rows.values()))
    yield from convolutions("conv1d", {name: rows[name] for name in ("x", "B", "C")}, conv_bias)
    yield from (Same(name, (name,)) for name in ("A_log", "D", "dt_bias"))
    if norm:
        yield Same("norm.weight", ("norm.weight",))
    yield from linear("out_proj", "out", out_bias)


def mamba1(inner: int, rank: int, state: int, *, bias: bool, conv_bias: bool) -> Iterator[Same]:
    """Mamba with one map in for x and z, and one for dt, B and C."""
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Same(f"in_proj.{kind}", (f"x.{kind}", f"z.{kind}"), (inner, inner))
    yield Same("conv1d.weight", ("conv.weight",), view=TAPS)
    if conv_bias:
        yield Same("conv1d.bias", ("conv.bias",))
    yield Same("x_proj.weight", ("dt_down.weight", "B.weight", "C.weight"), (rank, state, state))
    yield Same("dt_proj.weight", ("dt_up.weight",))
    yield Same("dt_proj.bias", ("dt_bias",))
    yield from (Same(name, (name,)) for name in ("A_log", "D"))
    yield from linear("out_proj", "out", bias)


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
