"""The cache of attention: rings of slots that hold keys and values for later queries.

A ring is [batch, heads, slots, channels], heads before slots: a step reads a head's slots in one piece. Token n of a
document is in slot n modulo the number of slots, but for a prefix, whose slots stay. A ring without a window grows, and
never wraps.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusiontree.components import Context, Rows, State
from fusiontree.kernels.attention import Filled

Ring = Float[Tensor, "batch heads slots channels"]
Chunk = Float[Tensor, "batch time heads channels"]
EMPTY = -1
"""What an empty slot holds."""


def rings(context: Context, state: State, names: Sequence[str], *, window: int | None) -> list[Ring]:
    """The rings of these names, with room for the chunk."""
    rows = _rows(context)
    if window is None and rows.slots_needed is not None:
        state.update({name: _with_slots(state[name], rows.slots_needed) for name in names})
    return [state[name] for name in names]


def _with_slots(ring: Ring, tokens: int) -> Ring:
    """Room for so many tokens; doubled so that growing stays cheap."""
    slots = ring.shape[2]
    return ring if tokens <= slots else F.pad(ring, (0, 0, 0, max(tokens, 2 * slots) - slots))


def write_token(context: Context, ring: Ring, values: Chunk) -> None:
    """Write a chunk of one token into a ring; each row writes one slot."""
    fresh, targets = _rows(context).has_tokens, context.once(token_slots, *ring.shape[1:3])
    slots, values = ring.view(-1, *ring.shape[3:]), values.flatten(0, 2).to(ring.dtype)
    if fresh is not None:
        fresh = fresh.repeat_interleave(ring.shape[1])
        values = torch.where(_over(fresh, values), values, slots[targets])
    slots.index_copy_(0, targets, values)


def write_chunk(context: Context, ring: Ring, values: Chunk) -> None:
    """Bring a ring up to date with a chunk."""
    slots, values = ring.transpose(1, 2), values.detach()
    index, fresh = _sources(_rows(context), slots.shape[1])
    gathered = values.gather(1, _over(index, values).expand(-1, -1, *values.shape[2:]))
    slots.copy_(torch.where(_over(fresh, values), gathered, slots))


def past(context: Context, ring: Ring) -> Chunk | None:
    """A copy of the filled slots before the chunk; None where there are none."""
    used = min(_rows(context).max_past_length, ring.shape[2])  # slots fill in order
    return ring.transpose(1, 2)[:, :used].clone() if used else None


def ages(context: Context, ring: Ring) -> Int[Tensor, "batch used"]:
    """How many tokens before the chunk each token is that `past` gives; 0 for an empty slot."""
    rows, slots = _rows(context), ring.shape[2]
    latest = _latest(rows, rows.past_length, slots)
    found = torch.where(latest >= 0, rows.past_length[:, None] - latest, 0)
    return found[:, : min(rows.max_past_length, slots)]


def token_slots(context: Context, heads: int, slots: int) -> Int[Tensor, "batch*heads"]:
    """Where rings, seen as [batch*heads*slots, channels], keep the token of each row, in a chunk of one."""
    rows = _rows(context)
    slot = (rows.new_length - (1 + rows.prefix)) % (slots - rows.prefix)
    slot = slot + rows.prefix if rows.prefix else slot
    first = torch.arange(0, len(rows.new_length) * heads * slots, slots, device=slot.device)
    return first + slot.repeat_interleave(heads)


def filled(context: Context, slots: int, dtype: torch.dtype) -> Filled:
    """The slots of a ring that hold a token after the chunk, which a step's queries see. A row without tokens counts as
    one token, because its slots are zeros."""
    return Filled.of(_rows(context).new_length.clamp(1, slots), slots, dtype)


def distances(context: Context, slots: int) -> Int[Tensor, "batch slots"]:
    """How many tokens before the row's last one the token in each filled slot is, after the chunk."""
    rows = _rows(context)
    return rows.new_length[:, None] - 1 - _latest(rows, rows.new_length, slots)


def _sources(rows: Rows, slots: int) -> tuple[Int[Tensor, "batch slots"], Bool[Tensor, "batch slots"]]:
    """For each slot: where in the chunk the token is that it holds afterwards, and whether that token is in the chunk
    at all (otherwise the slot keeps what it has)."""
    held = _latest(rows, rows.new_length, slots)
    fresh = held >= rows.continued_length[:, None]
    return torch.where(fresh, held - rows.continued_length[:, None] + rows.tail_start[:, None], 0), fresh


def _latest(rows: Rows, tokens: Int[Tensor, "batch"], slots: int) -> Int[Tensor, "batch slots"]:
    """The last of so many tokens of a document that each slot held; none where it is not among them."""
    slot, last = torch.arange(slots, device=tokens.device), tokens[:, None] - 1
    latest = last - (last - slot) % (slots - rows.prefix)
    latest = torch.where(slot < rows.prefix, slot, latest)
    return torch.where((latest >= slot) & (latest <= last), latest, EMPTY)


def _over(index: Tensor, values: Tensor) -> Tensor:
    """An index of leading dimensions, shaped to broadcast over values."""
    return index.reshape(*index.shape, *[1] * (values.ndim - index.ndim))


def _rows(context: Context) -> Rows:
    assert context.rows is not None
    return context.rows
