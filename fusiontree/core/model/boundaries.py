"""From document ids to what kernels need: padding behind the real tokens, segments, positions, cache rows."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from fusiontree.core.contracts.cache import Cache, Rows
from fusiontree.errors import FusionTreeError

Ids = Int[Tensor, "batch time"]


@dataclass(frozen=True)
class Layout:
    """A chunk of tokens as the nodes see it.

    Attributes:
        order: for each row, the order that moves padding to the end; None where padding is last already.
        segments: see `Context`.
        positions: see `Context`.
        rows: where the rows stand; None without a cache.
    """

    order: Ids | None
    segments: Ids | None
    positions: Ids
    rows: Rows | None


def readable(values: Tensor) -> bool:
    """Whether Python may read values: on a CPU, and not during torch.export. Reading from any other device would
    synchronise it and leave it idle."""
    return values.device.type == "cpu" and values.numel() > 0 and not torch.compiler.is_exporting()


def check_vocabulary(name: str, ids: Ids, size: int) -> None:
    """Checks token ids (at least one); synchronises with their device.

    Raises:
        FusionTreeError: one is outside 0..size - 1.
    """
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= size:
        raise FusionTreeError(f"{name}: found {low if low < 0 else high}, the vocabulary is 0..{size - 1}")


def padding_last(documents: Ids) -> Ids | None:
    """The stable order of each row that moves its padding (-1) behind the real tokens; None if it is known to be
    there."""
    padding = documents < 0
    if documents.shape[1] == 1 or (readable(padding) and not bool((padding[:, :-1] & ~padding[:, 1:]).any())):
        return None
    return torch.argsort(padding.byte(), dim=1, stable=True)


def arrange(
    like: Ids, documents: Ids | None, positions: Ids | None, cache: Cache | None, *, one_form: bool = False
) -> Layout:
    """Work out the layout of a chunk whose tokens have the shape and device of `like`; the cache stays as it is.

    Segments are None where the chunk is known to have no boundary, which is faster. With `one_form`, `documents` always
    give segments, so that a compiled model needs one graph.
    """
    if documents is None:
        return _one_document(like, positions, cache)
    order = padding_last(documents)
    if order is not None:
        documents = documents.gather(1, order)
        positions = None if positions is None else positions.gather(1, order)
    layout = _many_documents(order, documents, positions, cache)
    return layout if one_form else _without_idle_segments(layout)


def _without_idle_segments(layout: Layout) -> Layout:
    """No segments where every token is known to be of segment 0, so that every row has fresh ones."""
    if layout.segments is None or not readable(layout.segments) or bool((layout.segments != 0).any()):
        return layout
    rows = None if layout.rows is None else replace(layout.rows, has_tokens=None)
    return replace(layout, segments=None, rows=rows)


def _one_document(like: Ids, positions: Ids | None, cache: Cache | None) -> Layout:
    if positions is None:
        positions = _following(like, cache)
    if cache is None:
        return Layout(None, None, positions, None)
    rows = Rows(
        past_length=cache.lengths,
        tail_start=torch.zeros_like(cache.lengths),
        continued_length=cache.lengths,
        new_length=cache.lengths + like.shape[1],
        positions=positions[:, -1] + 1,
        documents=cache.documents,
        has_tokens=None,
        max_past_length=cache.length_bound,
        slots_needed=cache.slots_needed(like.shape[1]),
    )
    return Layout(None, None, positions, rows)


def _following(like: Ids, cache: Cache | None) -> Ids:
    """The positions behind what the cache holds."""
    if cache is not None and like.shape[1] == 1:
        return cache.positions[:, None]
    first = cache.positions[:, None] if cache else 0
    return (torch.arange(like.shape[1], device=like.device) + first).expand_as(like)


def _many_documents(order: Ids | None, documents: Ids, positions: Ids | None, cache: Cache | None) -> Layout:
    starts = _starts(documents, cache)
    segments = starts.cumsum(1).masked_fill(documents < 0, -1)
    steps = torch.arange(documents.shape[1], device=documents.device)
    opened = torch.where(starts, steps, 0).cummax(1).values
    if positions is None:
        first = cache.positions[:, None] if cache else 0
        positions = steps - opened + torch.where(segments == 0, first, 0)
    positions = positions.masked_fill(documents < 0, 0)
    rows = _rows(cache, segments, opened, positions, documents) if cache else None
    return Layout(order, segments, positions, rows)


def _starts(documents: Ids, cache: Cache | None) -> Bool[Tensor, "batch time"]:
    """Where a document starts that is not the cache's open one; a row's first continues an empty cache."""
    before = F.pad(documents[:, :-1], (1, 0))
    first = documents[:, 0]
    before[:, 0] = torch.where(cache.lengths > 0, cache.documents, first) if cache else first
    return (documents != before) & (documents >= 0)


def _rows(cache: Cache, segments: Ids, opened: Ids, positions: Ids, documents: Ids) -> Rows:
    real = (segments >= 0).sum(1)
    last = (real - 1).clamp(min=0)[:, None]
    empty = real == 0
    continues = empty | (segments.gather(1, last)[:, 0] == 0)
    tail_start = torch.where(continues, 0, opened.gather(1, last)[:, 0])
    continued_length = torch.where(continues, cache.lengths, 0)
    return Rows(
        past_length=cache.lengths,
        tail_start=tail_start,
        continued_length=continued_length,
        new_length=continued_length + real - tail_start,
        positions=torch.where(empty, cache.positions, positions.gather(1, last)[:, 0] + 1),
        documents=torch.where(empty, cache.documents, documents.gather(1, last)[:, 0]),
        has_tokens=~empty,
        max_past_length=cache.length_bound,
        slots_needed=cache.slots_needed(segments.shape[1]),
    )
