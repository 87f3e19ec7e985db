"""A decay for each channel of a key (Kimi Delta Attention, arXiv 2510.26692, section 3).

The product of a_i with what is left at i of b_j is then sum_n a_in b_jn exp(G_in - G_jn), where G is the sum of logs
since the chunk began: no matrix product times a factor. As the product of a exp(G) with b exp(-G) it would overflow;
where R is G at a token between the two, a exp(G - R) and b exp(R - G) never do. So each token behind the middle of a
chunk meets those before it with the middle as R, and the same holds in each half, down to two neighbours.

The logs of a level are sums of those of the level below. Nothing is subtracted, so that a strong decay takes no digits
of a weak one beside it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fusiontree.kernels.common.chunks import Documents
from fusiontree.kernels.gated_delta.decays import Factors, Keys, Scores

Half = Float[Tensor, "b c g r blocks half n"]


class Level(NamedTuple):
    """Blocks of two halves: what is left of the middle at each token behind it, and at the middle of each token
    before it."""

    since: Half
    until: Half

    def behind(self, values: Keys) -> Half:
        """Of tokens, those behind the middle of a block."""
        return self._halves(values)[..., 1, :, :]

    def before(self, values: Keys) -> Half:
        """Those before it."""
        return self._halves(values)[..., 0, :, :]

    def _halves(self, values: Keys) -> Float[Tensor, "b c g r blocks 2 half n"]:
        return values.unflatten(-2, (-1, 2, self.since.shape[-2]))

    def corners(self, scores: Scores) -> Float[Tensor, "b c g r blocks half half"]:
        """Of scores, those of tokens behind a middle with tokens before it, as a view."""
        rows = self._halves(scores)[..., 1, :, :]
        return rows.unflatten(-1, (-1, 2, rows.shape[-2]))[..., 0, :].diagonal(0, -4, -2).movedim(-1, -3)


class PerChannel(NamedTuple):
    """See `decays.DeltaDecays`. `seen`: which token meets which; `levels` are of chunks filled up to a power of two."""

    entry: Keys
    exit: Keys
    across: Float[Tensor, "b c g r n 1"]
    seen: Bool[Tensor, "#b #c 1 1 chunk chunk"]
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, log: Keys, documents: Documents | None) -> "PerChannel":
        """From the log decay of each token."""
        time = log.shape[-2]
        levels, since, until = _levels(_filled(log))
        entry, exit = since[..., :time, :], until[..., :time, :]
        across, seen = entry[..., -1:, :], torch.ones(time, time, dtype=torch.bool, device=log.device).tril()
        if documents is not None:
            own, first = (each[:, :, None, None, :, None] for each in documents)
            last = own[..., -1:, :]
            entry, exit = entry.masked_fill(own != first, -torch.inf), exit.masked_fill(own != last, -torch.inf)
            across, seen = across.masked_fill(first != last, -torch.inf), seen & (own == own.mT)
        return cls(entry.exp(), exit.exp(), across.exp().mT, seen, levels)

    def product(self, a: Keys, b: Keys) -> Scores:
        """Level by level; a token meets itself undiminished."""
        time, a, b = a.shape[-2], _filled(a), _filled(b)
        scores = a.new_zeros(*self.entry.shape[:4], a.shape[-2], a.shape[-2])
        scores.diagonal(0, -2, -1).copy_((a * b).sum(-1))
        for level in self.levels:
            level.corners(scores).copy_((level.behind(a) * level.since) @ (level.before(b) * level.until).mT)
        return scores[..., :time, :time].masked_fill(~self.seen, 0)

    def backward(self, grad: Scores, a: Keys, b: Keys) -> Factors:
        """A token's product with itself says nothing of decays."""
        grad = grad.masked_fill(~self.seen, 0)
        of_a, of_b = (wanted[..., : a.shape[-2], :] for wanted in self._of_others(grad, _filled(a), _filled(b)))
        own = grad.diagonal(0, -2, -1)[..., None]
        shared = [(wanted + own * other).sum(3, keepdim=True) for wanted, other in ((of_a, b), (of_b, a))]
        return Factors(*shared, log=a * of_a - b * of_b)

    def _of_others(self, grad: Scores, a: Keys, b: Keys) -> tuple[Keys, Keys]:
        """What the products of different tokens want of both factors, for every head."""
        grad = _filled(_filled(grad).mT).mT
        of_a, of_b = (factor.new_zeros(*grad.shape[:-1], factor.shape[-1]) for factor in (a, b))
        for level in self.levels:
            corners = level.corners(grad)
            level.behind(of_a).copy_(level.behind(of_a) + corners @ (level.before(b) * level.until) * level.since)
            level.before(of_b).copy_(level.before(of_b) + corners.mT @ (level.behind(a) * level.since) * level.until)
        return of_a, of_b

    def gathered(self, log: Keys) -> Keys:
        """Each channel's own."""
        return log


def _levels(log: Keys) -> tuple[tuple[Level, ...], Keys, Keys]:
    """The levels, neighbours first; then the logs from before the chunk to each token, and from there to its end."""
    levels, since, until = [], log[..., None, :], torch.zeros_like(log)[..., None, :]
    while since.shape[-3] > 1:
        (first, second), (left, right) = (each.unflatten(-3, (-1, 2)).unbind(-3) for each in (since, until))
        levels.append(Level(second.exp(), left.exp()))
        since = torch.cat([first, first[..., -1:, :] + second], -2)
        until = torch.cat([left + second[..., -1:, :], right], -2)
    return tuple(levels), since.squeeze(-3), until.squeeze(-3)


def _filled(values: Keys) -> Keys:
    """With zeros behind the last token, so that there is a power of two of them."""
    time = values.shape[-2]
    return F.pad(values, (0, 0, 0, (1 << (time - 1).bit_length()) - time))
