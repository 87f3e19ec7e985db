"""Learned vectors before the tokens of every document (meta tokens; Hymba, arXiv 2411.13676).

They are in the stream of every layer, at the first positions, and attention sees them whatever its window. Callers of
the model do not see them.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusiontree.core.contracts.cache import Cache, Rows
from fusiontree.core.contracts.modules import Module, normal
from fusiontree.core.model.boundaries import Ids, Layout, readable
from fusiontree.core.model.spec import PrefixSpec

Stream = Float[Tensor, "batch time width"]


class Prefix(Module):
    """The module of a `PrefixSpec`."""

    def __init__(self, spec: PrefixSpec, width: int) -> None:
        super().__init__()
        self.weight = self.declare("weight", (spec.tokens, width), normal(0.02))

    def forward(self, tokens: Stream, places: "Places | None") -> Float[Tensor, "batch longer width"]:
        """The stream of a chunk whose tokens' embeddings are given."""
        if places is None:
            return tokens
        own = self.weight.to(tokens.dtype)[places.vectors]
        text = tokens.gather(1, places.tokens[..., None].expand(-1, -1, tokens.shape[-1]))
        return torch.where(places.is_text[..., None], text, own)


@dataclass(frozen=True)
class Places:
    """Indices in the stream of a chunk, after a prefix is inserted before each document that starts in it.

    Attributes:
        of_tokens: the index of each token in the stream.
        tokens: for each stream index, its token; inside a prefix, the first token after the prefix.
        vectors: for each stream index, which learned vector; undefined at tokens.
        is_text: which stream indices hold tokens.
        is_real: which stream indices are neither padding nor past the row's end.
    """

    of_tokens: Int[Tensor, "batch time"]
    tokens: Int[Tensor, "batch longer"]
    vectors: Int[Tensor, "batch longer"]
    is_text: Bool[Tensor, "batch longer"]
    is_real: Bool[Tensor, "batch longer"]

    def text(self, stream: Float[Tensor, "batch longer width"]) -> Stream:
        """The stream at the tokens."""
        return stream.gather(1, self.of_tokens[..., None].expand(-1, -1, stream.shape[-1]))


def insert(layout: Layout, count: int, cache: Cache | None) -> tuple[Layout, Places | None]:
    """The layout of the stream, and the indices of tokens in it (None where no document starts).

    Args:
        layout: of the tokens, as `boundaries.arrange` has made it.
        count: learned vectors before each document.
        cache: the one that `layout.rows` are the rows of.
    """
    begins = _begins(layout, cache)
    places = None if begins is None else _places(begins, layout.segments, count)
    rows = None if layout.rows is None else _rows(layout.rows, places, count)
    if places is None:
        return replace(layout, positions=layout.positions + count, rows=rows), None
    positions = layout.positions.gather(1, places.tokens) + torch.where(places.is_text, count, places.vectors)
    segments = None
    if layout.segments is not None:
        segments = layout.segments.gather(1, places.tokens).masked_fill(~places.is_real, -1)
    elif cache is not None and not (readable(places.is_real) and bool(places.is_real.all())):
        segments = torch.where(places.is_real, 0, -1)
    return Layout(None, segments, positions.masked_fill(~places.is_real, 0), rows), places


def _begins(layout: Layout, cache: Cache | None) -> Bool[Tensor, "batch time"] | None:
    """The mask of tokens that start a new document; None where none is known to exist."""
    fresh = torch.ones_like(layout.positions[:, 0], dtype=torch.bool)
    if layout.rows is not None:
        fresh = layout.rows.past_length == 0
    if layout.segments is not None:
        before = torch.cat([torch.where(fresh, -1, 0)[:, None], layout.segments[:, :-1]], 1)
        return (layout.segments != before) & (layout.segments >= 0)
    if cache is not None and cache.every_row_started():
        return None
    return torch.cat([fresh[:, None], torch.zeros_like(layout.positions[:, 1:], dtype=torch.bool)], 1)


def _places(begins: Bool[Tensor, "batch time"], segments: Ids | None, count: int) -> Places:
    time = begins.shape[1]
    started = begins.cumsum(1)
    of_tokens = torch.arange(time, device=begins.device) + count * started
    # In a chunk without segments documents start in its first column, and prefixes are of one length.
    most = 1 if segments is None else int(started[:, -1].max())
    place = torch.arange(time + count * most, device=begins.device).expand(len(begins), -1).contiguous()
    token = torch.searchsorted(of_tokens.contiguous(), place)
    behind = token == time
    token = token.clamp(max=time - 1)
    ahead = of_tokens.gather(1, token) - place
    is_text = (ahead == 0) & ~behind
    is_real = ~behind if segments is None else ~behind & (segments.gather(1, token) >= 0)
    return Places(of_tokens, token, (count - ahead).clamp(0, count - 1), is_text, is_real)


def _rows(rows: Rows, places: Places | None, count: int) -> Rows:
    """The same rows where prefixes count, too."""

    def with_prefix(tokens: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        return torch.where(tokens > 0, tokens + count, 0)

    tail = rows.tail_start
    if places is not None:
        starts = (rows.continued_length == 0) & (rows.new_length > 0)
        tail = torch.where(starts, places.of_tokens.gather(1, tail[:, None])[:, 0] - count, 0)
    return replace(
        rows,
        past_length=with_prefix(rows.past_length),
        tail_start=tail,
        continued_length=with_prefix(rows.continued_length),
        new_length=with_prefix(rows.new_length),
        max_past_length=rows.max_past_length + count if rows.max_past_length else 0,
        slots_needed=None if rows.slots_needed is None else rows.slots_needed + count,
        prefix=count,
    )
