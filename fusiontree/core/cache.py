"""What a model remembers of the tokens it has seen: named tensors by node path, and where each row stands."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fusiontree.errors import FusionTreeError


@dataclass(frozen=True)
class Rows:
    """Where the rows of a chunk stand, for the nodes that write a cache.

    Attributes:
        before: tokens of the row's open document that the cache holds as the chunk starts.
        tail: index in the chunk of the first token of the document that is open at its end.
        carried: tokens of that document that came before the chunk.
        after: tokens of that document once the chunk is in.
        positions: the position that the row's next token has.
        documents: the id of the document that is open at the chunk's end.
        most: no row's `after` is larger; known without looking at the device.
    """

    before: Int[Tensor, "batch"]
    tail: Int[Tensor, "batch"]
    carried: Int[Tensor, "batch"]
    after: Int[Tensor, "batch"]
    positions: Int[Tensor, "batch"]
    documents: Int[Tensor, "batch"]
    most: int

    def ages(self, slots: int) -> Int[Tensor, "batch slots"]:
        """How many tokens before the chunk the token in each slot of a ring is; 0 for an empty slot."""
        slot = torch.arange(slots, device=self.before.device)
        age = (self.before[:, None] - 1 - slot) % slots + 1
        return torch.where(age <= self.before[:, None], age, 0)

    def sources(self, slots: int) -> tuple[Int[Tensor, "batch slots"], Bool[Tensor, "batch slots"]]:
        """For each slot of a ring: where in the chunk the token is that it holds afterwards, and whether that
        token is in the chunk at all (otherwise the slot keeps what it has)."""
        slot = torch.arange(slots, device=self.after.device)
        last = self.after[:, None] - 1
        held = last - (last - slot) % slots
        fresh = held >= self.carried[:, None]
        return torch.where(fresh, held - self.carried[:, None] + self.tail[:, None], 0), fresh

    def write(self, ring: Tensor, values: Tensor) -> None:
        """Bring a ring [batch, slots, ...] up to date with a chunk's values [batch, time, ...], in place."""
        values, slots = values.detach(), ring.shape[1]
        if values.shape[1] == 1:  # a decode step touches one slot
            row, slot = torch.arange(ring.shape[0], device=ring.device), (self.after - 1).clamp(min=0) % slots
            fresh = _over(self.after > self.carried, values[:, 0])
            ring[row, slot] = torch.where(fresh, values[:, 0], ring[row, slot])
            return
        index, fresh = self.sources(slots)
        gathered = values.gather(1, _over(index, values).expand(-1, -1, *values.shape[2:]))
        ring.copy_(torch.where(_over(fresh, values), gathered, ring))


def _over(index: Tensor, values: Tensor) -> Tensor:
    """An index of leading dimensions, shaped to broadcast over values."""
    return index.reshape(*index.shape, *[1] * (values.ndim - index.ndim))


class Cache:
    """The memory of a batch of sequences.

    A row continues its open document while the next tokens carry the same document id (or none); another id
    opens a new one. `nbytes` counts the nodes' states; the rows' own counters (24 bytes a row) are not in it.
    """

    def __init__(
        self, states: Mapping[str, dict[str, Tensor]], like: Int[Tensor, "batch"], capacity: int | None
    ) -> None:
        self.states = states
        self.capacity = capacity
        self.seen = torch.zeros_like(like)
        self.positions = torch.zeros_like(like)
        self.documents = torch.zeros_like(like)
        self._most = 0

    @property
    def batch(self) -> int:
        """The number of rows."""
        return self.seen.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for state in self.states.values() for tensor in state.values())

    def reserve(self, tokens: int) -> int:
        """Make sure that `tokens` more fit every row; the most that a row may then hold.

        Raises:
            FusionTreeError: they do not.
        """
        if self.capacity is not None and self._most + tokens > self.capacity:
            self._most = int(self.seen.max())
            if self._most + tokens > self.capacity:
                found = f"{self._most} tokens and {tokens} more"
                raise FusionTreeError(f"cache: {found} do not fit, its max_length is {self.capacity}")
        return self._most + tokens

    def advance(self, rows: Rows) -> None:
        """Take note of a chunk that every node has seen."""
        self.seen, self.positions, self.documents = rows.after, rows.positions, rows.documents
        self._most = rows.most
