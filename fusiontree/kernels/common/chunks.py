"""Chunks of the time and decays between their tokens, shared by the chunked scans.

No exponent is ever positive, and cumulative sums of the log decay restart at each chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 64
DECAYS_A_STEP = 2**18
"""How many decays within chunks are held at once: a megabyte in float32."""


def spans(tokens: Float[Tensor, "batch time heads channels"]) -> Iterator[tuple[slice, int]]:
    """Cut the time into steps of whole chunks, then one shorter chunk: nothing is ever padded."""
    batch, time, heads, _ = tokens.shape
    step = CHUNK * max(1, DECAYS_A_STEP // max(1, batch * heads * CHUNK * CHUNK))
    whole = time - time % CHUNK
    for start in range(0, whole, step):
        yield slice(start, min(start + step, whole)), CHUNK
    if whole < time:
        yield slice(whole, time), time - whole


class Documents(NamedTuple):
    """The segments of a step's tokens. `entering`: the segment of the state that each chunk starts from."""

    own: Int[Tensor, "batch chunks chunk"]
    entering: Int[Tensor, "batch chunks 1"]

    @classmethod
    def of(cls, segments: Int[Tensor, "batch time"] | None, span: slice, chunk: int) -> "Documents | None":
        """The segments of a step; None without boundaries."""
        if segments is None:
            return None
        own = rearrange(segments[:, span], "b (c q) -> b c q", q=chunk)
        first = segments[:, span.start - 1, None] if span.start else torch.zeros_like(segments[:, :1])
        return cls(own, torch.cat([first, own[:, :-1, -1]], dim=1)[..., None])

    @property
    def begins(self) -> Bool[Tensor, "batch chunks"]:
        """Which chunks begin with another document than that of the state before them."""
        return self.own[..., 0] != self.entering[..., 0]


def forgotten(state: Tensor, documents: Documents | None, chunk: int) -> Tensor:
    """The state before a chunk, zeros where a document begins with the chunk: a factor of 0 would keep what is no
    number."""
    if documents is None:
        return state
    return state.masked_fill(documents.begins[:, chunk].view(-1, *(1 for _ in state.shape[1:])), 0.0)


class Decays(NamedTuple):
    """Factors in [0, 1], all per group and head of the group (`r`), zero across documents."""

    within: Float[Tensor, "b c g r chunk chunk"]
    entry: Float[Tensor, "b c g r chunk"]
    exit: Float[Tensor, "b c g r chunk"]
    across: Float[Tensor, "b c g r 1"]

    @classmethod
    def of(cls, log_decay: Float[Tensor, "b c g r chunk"], documents: Documents | None) -> "Decays":
        """From token j to i >= j, from before the chunk to i, from i to after the chunk, and from before to after."""
        total = log_decay.cumsum(-1)
        causal = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril()
        entry = exit = across = None
        if documents is not None:
            own = documents.own[:, :, None, None, :]
            first, last = documents.entering[:, :, None, None, :], own[..., -1:]
            causal = causal & (own[..., :, None] == own[..., None, :])
            entry, exit, across = own == first, own == last, first == last
        return cls(
            within=_exp_where(causal, total[..., :, None] - total[..., None, :]),
            entry=_exp_where(entry, total),
            exit=_exp_where(exit, total[..., -1:] - total),
            across=_exp_where(across, total[..., -1:]),
        )


def _exp_where(visible: Bool[Tensor, "..."] | None, exponent: Tensor) -> Tensor:
    # The mask comes before exp: an exponent that looks ahead is positive and may overflow.
    return torch.exp(exponent if visible is None else exponent.masked_fill(~visible, -torch.inf))


def by_chunk(values: Float[Tensor, "b c*q h *p"], chunk: int, groups: int) -> Float[Tensor, "b c g r q *p"]:
    """Tokens by chunk, heads by group."""
    return rearrange(values, "b (c q) (g r) ... -> b c g r q ...", q=chunk, g=groups)


def by_token(values: Float[Tensor, "b c g r q *p"]) -> Float[Tensor, "b c*q h *p"]:
    """The reverse of `by_chunk`."""
    return rearrange(values, "b c g r q ... -> b (c q) (g r) ...")
