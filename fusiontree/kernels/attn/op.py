"""The operator `attention`: its arguments, what sees what, and what the choice of a backend depends on."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusiontree.kernels.documents import previous
from fusiontree.kernels.registry import Op

EMPTY = -2
"""The segment of an empty cache slot: no query, not even a padded one, has it."""


class Past(NamedTuple):
    """Cached keys, in any order. `age`: tokens from a key to the call's first one (0: an empty slot)."""

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
    one_query: bool
    equal_widths: bool
    gradients: bool


class Sight(NamedTuple):
    """What decides who sees whom: places in time (cached keys are before 0) and documents.

    A query sees a key of the same segment at its own place or up to window - 1 before it. Padding is
    segment -1 and so sees padding, which keeps every softmax finite.
    """

    key_places: Int[Tensor, "rows keys"]
    key_segments: Int[Tensor, "batch keys"] | None
    query_segments: Int[Tensor, "batch time"] | None
    window: int | None
    cached: int
    document_starts: list[int] | None = None

    def keys_of(self, queries: slice) -> slice:
        """A slice of the keys (cached ones first) that holds all that `queries` may see."""
        oldest = -self.cached if self.window is None else queries.start - self.window + 1
        if self.document_starts is not None:
            oldest = max(oldest, self.document_starts[queries.start])
        # Cached keys are in no order: who reaches one place before the call may need any of them.
        return slice(0 if oldest < 0 else self.cached + oldest, self.cached + queries.stop)

    def with_document_starts(self) -> "Sight":
        """Knowing how far back the documents reach in any row (-1: before the call); reads data back."""
        if self.query_segments is None:
            return self
        segments = self.query_segments
        places = torch.arange(segments.shape[1], device=segments.device)
        starts = torch.where(segments != previous(segments), places, -1).cummax(1).values
        return self._replace(document_starts=starts.amin(0).tolist())

    def visible(self, queries: slice, keys: slice) -> Bool[Tensor, "rows queries keys"]:
        """Which of `keys` each of `queries` sees; `rows` is 1 where all rows are alike."""
        places = self.key_places[:, None, keys]
        distance = torch.arange(queries.start, queries.stop, device=places.device)[:, None] - places
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.key_segments is not None and self.query_segments is not None:
            seen = seen & (self.query_segments[:, queries, None] == self.key_segments[:, None, keys])
        return seen


class AttentionInputs(NamedTuple):
    """The arguments of `attention`."""

    q: Float[Tensor, "batch time heads head_dim"]
    k: Float[Tensor, "batch time kv_heads head_dim"]
    v: Float[Tensor, "batch time kv_heads value_dim"]
    window: int | None
    scale: float
    softcap: float | None
    segments: Int[Tensor, "batch time"] | None
    past: Past | None

    @property
    def request(self) -> AttentionRequest:
        """See `registry.Inputs`."""
        time, past = self.q.shape[1], self.past
        tensors = (self.q, self.k, self.v) + (() if past is None else (past.keys, past.values))
        return AttentionRequest(
            device=self.q.device.type,
            dtype=self.q.dtype,
            windowed=self.window is not None and (past is not None or self.window < time),
            softcap=self.softcap is not None,
            segments=self.segments is not None,
            past=past is not None,
            one_query=time == 1,
            equal_widths=self.k.shape[-1] == self.v.shape[-1],
            gradients=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        )

    def all_keys(self) -> tuple[Tensor, Tensor]:
        """Keys and values, cached ones first."""
        if self.past is None:
            return self.k, self.v
        keys, values = self.past.keys.to(self.k.dtype), self.past.values.to(self.v.dtype)
        return torch.cat([keys, self.k], dim=1), torch.cat([values, self.v], dim=1)

    def sight(self) -> Sight:
        """Places and segments of all keys."""
        batch, time = self.q.shape[:2]
        places = torch.arange(time, device=self.q.device)[None]
        if self.past is None:
            return Sight(places, self.segments, self.segments, self.window, 0)
        age, own = self.past.age, self.segments
        own = torch.zeros(batch, time, dtype=age.dtype, device=age.device) if own is None else own
        cached = torch.where(age > 0, 0, EMPTY).to(own.dtype)
        places = torch.cat([-age, places.to(age.dtype).expand(batch, -1)], dim=1)
        return Sight(places, torch.cat([cached, own], dim=1), own, self.window, age.shape[1])


ATTENTION: Op[AttentionInputs] = Op("attention")
