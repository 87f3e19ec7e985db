"""The operator `attention`: its arguments, what sees what, and what the choice of a backend depends on."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusiontree.errors import FusionTreeError
from fusiontree.kernels.constants import constants
from fusiontree.kernels.documents import previous, wide
from fusiontree.kernels.registry import Op
from fusiontree.kernels.shapes import Shapes
from fusiontree.kernels.untraced import Untraced

BEYOND = 2**40
"""Farther than any token."""


class Past(NamedTuple):
    """Cached keys, in any order; a prefix comes first. `age`: tokens from a key to the call's first one (0: an
    empty slot)."""

    keys: Float[Tensor, "batch cached kv_heads head_dim"]
    values: Float[Tensor, "batch cached kv_heads value_dim"]
    age: Int[Tensor, "batch cached"]


class AttentionRequest(NamedTuple):
    """What is asked of a backend of `attention`."""

    device: str
    dtype: torch.dtype
    windowed: bool
    softcap: bool
    segments: bool
    past: bool
    prefix: bool
    head_dim: int
    value_dim: int
    gradients: bool
    slopes: bool = False

    @property
    def equal_widths(self) -> bool:
        """Whether keys and values have the same width."""
        return self.head_dim == self.value_dim


class Folding(NamedTuple):
    """How biases are laid out: the `share` query heads of a key-value head are rows of each query, and with `slopes`,
    one for each query head, scores fall with the distance."""

    share: int
    dtype: torch.dtype
    slopes: tuple[float, ...] | None = None

    def fall(self, distance: Int[Tensor, "#batch queries keys"]) -> Float[Tensor, "#batch kv_heads rows keys"]:
        """-slope * distance, in float32 or better."""
        assert self.slopes is not None
        slopes = constants(self.slopes, wide(self.dtype), distance.device)
        by_row = slopes.view(-1, self.share).repeat(1, distance.shape[1])
        return distance.repeat_interleave(self.share, 1)[:, None] * -by_row[..., None]


class Sight(NamedTuple):
    """Which keys each query sees: those of places from `first` to the query's own, and its document's prefix.

    Attributes:
        places: where keys stand in time; cached ones are before 0, empty slots behind everything.
        first: the first place that each query sees. Padding sees padding, which keeps every softmax finite.
        starts: where each query's document starts; None where nobody needs to know.
        cached: how many keys are cached ones; those stand in no order.
        prefix: how many keys from a document's first one on no window hides.
        heads: which key is the first of each query's document; None where there is no prefix.
    """

    places: Int[Tensor, "#batch keys"]
    first: Int[Tensor, "#batch time"]
    starts: Int[Tensor, "#batch time"] | None
    cached: int
    prefix: int = 0
    heads: Int[Tensor, "#batch time"] | None = None

    def blocks(self, size: int) -> Iterator[tuple[slice, slice, bool]]:
        """Blocks of `size` queries, the keys that any of them sees, and whether documents hide none of those from
        those in the window; reads data back."""
        time = self.first.shape[1]
        firsts, starts = self._reach(size)
        for index, (first, start) in enumerate(zip(firsts, starts, strict=True)):
            queries = slice(index * size, min((index + 1) * size, time))
            # Cached keys are in no order: who reaches one place before the call may need any of them.
            keys = slice(0 if first < 0 else self.cached + first, self.cached + queries.stop)
            yield queries, keys, self.cached == 0 and start <= first

    def _reach(self, size: int) -> tuple[list[int], list[int]]:
        """For each block the first place that its first query sees in any row, and the last document start."""
        firsts = self.first[:, ::size].amin(0)
        if self.starts is None:
            return firsts.tolist(), [-BEYOND] * len(firsts)
        last = [min(start + size, self.first.shape[1]) - 1 for start in range(0, self.first.shape[1], size)]
        reach = torch.stack([firsts, self.starts[:, last].amax(0)]).tolist()
        return reach[0], reach[1]

    def before(self, queries: slice, keys: slice) -> Int[Tensor, "#batch prefix"] | None:
        """The prefix of the first query's document, where keys begin behind its start; what of it is among the keys is
        cut to the first of them. The prefixes of documents that start later are all among the keys."""
        if self.heads is None or keys.start == 0:
            return None
        index = torch.arange(min(self.prefix, keys.start), device=self.heads.device)
        return (self.heads[:, queries.start, None] + index).clamp(max=keys.start)

    def bias(self, queries: slice, keys: slice, folding: Folding) -> Float[Tensor, "#batch #kv_heads rows keys"]:
        """What is added to scores, for what `before` has found and the keys behind it: -inf where a query does not see
        a key."""
        own = torch.arange(queries.start, queries.stop, device=self.first.device)[:, None]
        if self.heads is None:
            places = self.places[:, None, keys]
            seen = (places >= self.first[:, queries, None]) & (places <= own)
        else:
            places, seen = self._seen_with_prefix(queries, keys, own)
        seen = seen.repeat_interleave(folding.share, 1)
        if folding.slopes is not None:
            return folding.fall(own - places).masked_fill(~seen[:, None], -torch.inf)
        return torch.zeros(seen.shape, dtype=folding.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]

    def _seen_with_prefix(
        self, queries: slice, keys: slice, own: Tensor
    ) -> tuple[Int[Tensor, "#batch 1 keys"], Bool[Tensor, "#batch queries keys"]]:
        """Where the keys stand, and which of them each query sees."""
        assert self.heads is not None
        index = torch.arange(keys.start, keys.stop, device=own.device)[None]
        before, rows = self.before(queries, keys), max(len(self.places), len(self.heads))
        if before is not None:
            before = torch.where(before < keys.start, before, -1)  # nobody sees a key twice
            index = torch.cat([before, index.expand(len(before), -1)], 1)
        index = index.expand(rows, -1)
        places, heads = self.places.expand(rows, -1).gather(1, index.clamp(min=0)), self.heads[:, queries, None]
        index, places = index[:, None], places[:, None]
        in_prefix = (index >= heads) & (index < heads + self.prefix)
        near = places >= self.first[:, queries, None]
        return places, (near | in_prefix) & (places <= own) & (index >= 0)


def sight(
    time: int, segments: Tensor | None, age: Tensor | None, reach: tuple[int | None, int], device: torch.device
) -> Sight:
    """What the queries of a call see, by the window and the prefix; see `attention`."""
    window, prefix = reach
    own = torch.arange(time, device=device)[None]
    first = torch.full_like(own, -BEYOND) if window is None else own - window + 1
    starts = None
    if segments is not None:
        starts = torch.where(segments != previous(segments), own, -BEYOND).cummax(1).values
        first = torch.maximum(first, starts)
    heads = _heads(starts, age, own) if prefix and window is not None else None
    if age is None:
        return Sight(own, first.clamp(min=0), starts, 0, prefix, heads)
    places = torch.where(age > 0, -age, BEYOND)
    places = torch.cat([places, own.to(places.dtype).expand(age.shape[0], -1)], dim=1)
    return Sight(places, first, starts, age.shape[1], prefix, heads)


def _heads(starts: Tensor | None, age: Tensor | None, own: Tensor) -> Int[Tensor, "#batch time"]:
    """The key that is the first of each query's document: in the call, or the first cached one."""
    starts = torch.full_like(own, -BEYOND) if starts is None else starts
    if age is None:
        return starts.clamp(min=0)
    continued = torch.where((age > 0).any(1, keepdim=True), 0, age.shape[1])
    return torch.where(starts < 0, continued, starts + age.shape[1])


class AttentionInputs(NamedTuple):
    """The arguments of `attention`."""

    q: Float[Tensor, "batch time heads head_dim"]
    k: Float[Tensor, "batch time kv_heads head_dim"]
    v: Float[Tensor, "batch time kv_heads value_dim"]
    window: int | None
    scale: float
    softcap: float | None
    segments: Int[Tensor, "batch time"] | None
    slopes: tuple[float, ...] | None = None
    past: Past | None = None
    prefix: int = 0

    @property
    def request(self) -> AttentionRequest:
        """See `registry.Inputs`."""
        time, past = self.q.shape[1], self.past
        windowed = self.window is not None and (past is not None or self.window < time)
        tensors = (self.q, self.k, self.v) + (() if past is None else (past.keys, past.values))
        return AttentionRequest(
            device=self.q.device.type,
            dtype=self.q.dtype,
            windowed=windowed,
            softcap=self.softcap is not None,
            segments=self.segments is not None,
            past=past is not None,
            prefix=windowed and self.prefix > 0,
            head_dim=self.k.shape[-1],
            value_dim=self.v.shape[-1],
            gradients=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
            slopes=self.slopes is not None,
        )

    def results(self) -> list[Tensor]:
        """See `untraced.Shaped`."""
        return [self.q.new_empty(*self.q.shape[:3], self.v.shape[-1])]

    def all_keys(self) -> tuple[Tensor, Tensor]:
        """Keys and values, cached ones first."""
        if self.past is None:
            return self.k, self.v
        keys, values = self.past.keys.to(self.k.dtype), self.past.values.to(self.v.dtype)
        return torch.cat([keys, self.k], dim=1), torch.cat([values, self.v], dim=1)

    def sight(self) -> Sight:
        """What the queries see."""
        age = None if self.past is None else self.past.age
        return sight(self.q.shape[1], self.segments, age, (self.window, self.prefix), self.q.device)


def per_head(op: str, slopes: Sequence[float], q: Float[Tensor, "... heads head_dim"]) -> tuple[float, ...]:
    """The slopes.

    Raises:
        FusionTreeError: there is not one for each query head.
    """
    if len(slopes) != q.shape[-2]:
        raise FusionTreeError(f"{op}: slopes: one for each of {q.shape[-2]} heads is needed, found {len(slopes)}")
    return tuple(slopes)


ATTENTION: Op[AttentionInputs] = Op("attention", Shapes(AttentionInputs, (("heads", "kv_heads"),)))
untraced = Untraced(
    "attention_untraced",
    "Tensor q, Tensor k, Tensor v, int? window, float scale, float? softcap, Tensor? segments, float[]? slopes",
    AttentionInputs,
)
"""Decorates backends, which serve no cached keys."""
