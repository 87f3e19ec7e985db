"""Which keys a query sees: the window, documents, the prefix, cached keys; and the biases that say so."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusiontree.kernels.common.constants import constants
from fusiontree.kernels.common.documents import accumulation_dtype, previous

BEYOND = 2**40
"""Farther than any token."""


class BiasLayout(NamedTuple):
    """How biases are laid out: the `queries_per_kv` query heads of a key-value head are rows of each query. With
    `slopes`, one for each query head, scores fall with the distance (ALiBi)."""

    queries_per_kv: int
    dtype: torch.dtype
    slopes: tuple[float, ...] | None = None

    def alibi(self, distance: Int[Tensor, "#batch queries keys"]) -> Float[Tensor, "#batch kv_heads rows keys"]:
        """-slope * distance, in float32 or better."""
        assert self.slopes is not None
        slopes = constants(self.slopes, accumulation_dtype(self.dtype), distance.device)
        by_row = slopes.view(-1, self.queries_per_kv).repeat(1, distance.shape[1])
        return distance.repeat_interleave(self.queries_per_kv, 1)[:, None] * -by_row[..., None]


class Visibility(NamedTuple):
    """Which keys each query sees: keys from `first_visible` to the query's own time, and its document's prefix.

    Attributes:
        key_times: times of the keys, counted from the call's first token; cached keys have negative times, empty slots
            come after every token.
        first_visible: the earliest time that each query sees. Padding sees padding, which keeps every softmax finite.
        document_starts: the time at which each query's document starts; None where no mask needs it.
        cached: how many keys are cached; cached keys have no order.
        prefix: how many keys from a document's first one on no window hides.
        first_keys: index of the first key of each query's document; None where there is no prefix.
    """

    key_times: Int[Tensor, "#batch keys"]
    first_visible: Int[Tensor, "#batch time"]
    document_starts: Int[Tensor, "#batch time"] | None
    cached: int
    prefix: int = 0
    first_keys: Int[Tensor, "#batch time"] | None = None

    def blocks(self, size: int) -> Iterator[tuple[slice, slice, bool]]:
        """Yield (queries, keys, no_document_mask_needed) for each block of `size` queries and the keys that any of
        them sees. Synchronises with the device."""
        time = self.first_visible.shape[1]
        firsts, starts = self._reach(size)
        for index, (first, start) in enumerate(zip(firsts, starts, strict=True)):
            queries = slice(index * size, min((index + 1) * size, time))
            # Cached keys have no order: a block that reaches one time before the call may need any of them.
            keys = slice(0 if first < 0 else self.cached + first, self.cached + queries.stop)
            yield queries, keys, self.cached == 0 and start <= first

    def _reach(self, size: int) -> tuple[list[int], list[int]]:
        """For each block the earliest time that its first query sees in any row, and the last document start."""
        firsts = self.first_visible[:, ::size].amin(0)
        if self.document_starts is None:
            return firsts.tolist(), [-BEYOND] * len(firsts)
        time = self.first_visible.shape[1]
        last = [min(start + size, time) - 1 for start in range(0, time, size)]
        reach = torch.stack([firsts, self.document_starts[:, last].amax(0)]).tolist()
        return reach[0], reach[1]

    def prefix_before(self, queries: slice, keys: slice) -> Int[Tensor, "#batch prefix"] | None:
        """Indices of the prefix keys that this block's first query needs and that lie before `keys`. Indices inside
        `keys` are clamped, and `bias` hides them; prefixes of documents that start later lie inside `keys`."""
        if self.first_keys is None or keys.start == 0:
            return None
        index = torch.arange(min(self.prefix, keys.start), device=self.first_keys.device)
        return (self.first_keys[:, queries.start, None] + index).clamp(max=keys.start)

    def bias(self, queries: slice, keys: slice, layout: BiasLayout) -> Float[Tensor, "#batch #kv_heads rows keys"]:
        """The bias on scores, -inf where a query does not see a key. Columns are the keys of `prefix_before`, then
        `keys`."""
        own = torch.arange(queries.start, queries.stop, device=self.first_visible.device)[:, None]
        if self.first_keys is None:
            times = self.key_times[:, None, keys]
            seen = (times >= self.first_visible[:, queries, None]) & (times <= own)
        else:
            times, seen = self._seen_with_prefix(queries, keys, own)
        seen = seen.repeat_interleave(layout.queries_per_kv, 1)
        if layout.slopes is not None:
            return layout.alibi(own - times).masked_fill(~seen[:, None], -torch.inf)
        return torch.zeros(seen.shape, dtype=layout.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]

    def _seen_with_prefix(
        self, queries: slice, keys: slice, own: Tensor
    ) -> tuple[Int[Tensor, "#batch 1 keys"], Bool[Tensor, "#batch queries keys"]]:
        """The times of the keys, and which of them each query sees."""
        assert self.first_keys is not None
        index = torch.arange(keys.start, keys.stop, device=own.device)[None]
        before, rows = self.prefix_before(queries, keys), max(len(self.key_times), len(self.first_keys))
        if before is not None:
            before = torch.where(before < keys.start, before, -1)  # no key is seen twice
            index = torch.cat([before, index.expand(len(before), -1)], 1)
        index = index.expand(rows, -1)
        times = self.key_times.expand(rows, -1).gather(1, index.clamp(min=0))
        first_keys = self.first_keys[:, queries, None]
        index, times = index[:, None], times[:, None]
        in_prefix = (index >= first_keys) & (index < first_keys + self.prefix)
        near = times >= self.first_visible[:, queries, None]
        return times, (near | in_prefix) & (times <= own) & (index >= 0)


def visibility_of(
    time: int, segments: Tensor | None, age: Tensor | None, reach: tuple[int | None, int], device: torch.device
) -> Visibility:
    """The visibility of a call's queries; `reach` is the window and the prefix (see `attention`)."""
    window, prefix = reach
    own = torch.arange(time, device=device)[None]
    first = torch.full_like(own, -BEYOND) if window is None else own - window + 1
    starts = None
    if segments is not None:
        starts = torch.where(segments != previous(segments), own, -BEYOND).cummax(1).values
        first = torch.maximum(first, starts)
    first_keys = _first_keys(starts, age, own) if prefix and window is not None else None
    if age is None:
        return Visibility(own, first.clamp(min=0), starts, 0, prefix, first_keys)
    times = torch.where(age > 0, -age, BEYOND)
    times = torch.cat([times, own.to(times.dtype).expand(age.shape[0], -1)], dim=1)
    return Visibility(times, first, starts, age.shape[1], prefix, first_keys)


def _first_keys(starts: Tensor | None, age: Tensor | None, own: Tensor) -> Int[Tensor, "#batch time"]:
    """Index of the first key of each query's document: in the call, or the first cached one."""
    starts = torch.full_like(own, -BEYOND) if starts is None else starts
    if age is None:
        return starts.clamp(min=0)
    continued = torch.where((age > 0).any(1, keepdim=True), 0, age.shape[1])
    return torch.where(starts < 0, continued, starts + age.shape[1])
