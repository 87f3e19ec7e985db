"""How recurrences that are gone through element by element are cut into blocks: many elements an operation, and no
more of them than a cache holds."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class TilingLimits(NamedTuple):
    """Block sizes for a type of device.

    Attributes:
        entries: entries of states in memory at once.
        whole: a block of at most this many tokens is one chunk.
        chunk: the tokens of a chunk in a longer block.
    """

    entries: int
    whole: int
    chunk: int


LIMITS = {"cpu": TilingLimits(2**19, 512, 64), "cuda": TilingLimits(2**26, 32, 32)}
"""Measured on CPUs, where two megabytes stay in a core's cache; on a GPU what counts is the number of operations."""
FEWEST, ENOUGH = 8, 32
"""A block's tokens of a row: the fewest, and how many make room for other rows."""


class Tiling(NamedTuple):
    """How batch and time are cut into blocks."""

    batch: int
    time: int
    rows: int
    chunks: int
    chunk: int

    @classmethod
    def of(cls, state: Float[Tensor, "batch *features"], time: int) -> "Tiling":
        """As many rows as leave enough tokens of each, then as many tokens as there is room for."""
        batch, limits = state.shape[0], LIMITS.get(state.device.type, LIMITS["cuda"])
        room = limits.entries // math.prod(state.shape[1:])
        rows = max(1, min(batch, room // ENOUGH))
        tokens = max(FEWEST, room // rows)
        chunk = tokens if tokens <= limits.whole else limits.chunk
        return cls(batch, time, rows, tokens // chunk, chunk)

    def rows_at_once(self) -> Iterator[slice]:
        """The batch, some rows at a time."""
        for start in range(0, self.batch, self.rows):
            yield slice(start, min(start + self.rows, self.batch))

    def spans(self) -> list[tuple[slice, int]]:
        """The time in whole chunks, some at a time, then one shorter chunk: nothing is ever padded."""
        whole, tokens = self.time - self.time % self.chunk, self.chunk * self.chunks
        spans = [(slice(start, min(start + tokens, whole)), self.chunk) for start in range(0, whole, tokens)]
        return spans if whole == self.time else [*spans, (slice(whole, self.time), self.time - whole)]
