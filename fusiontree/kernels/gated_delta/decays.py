"""Decays between the tokens of a chunk of `gated_delta`: the interface of all forms, and the form with one decay a
head."""

from typing import NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common import chunks
from fusiontree.kernels.common.chunks import Documents

Logs = Float[Tensor, "b c g r chunk channels"]
Keys = Float[Tensor, "b c g r chunk n"]
Scores = Float[Tensor, "b c g r chunk chunk"]


class Factors(NamedTuple):
    """The gradients of a product's factors, and of the log decay since the chunk began."""

    a: Float[Tensor, "b c g 1 chunk n"]
    b: Float[Tensor, "b c g 1 chunk n"]
    log: Logs


class DeltaDecays(Protocol):
    """Factors in [0, 1], zero across documents; `channels` is 1, or as many as keys have."""

    @property
    def entry(self) -> Logs:
        """How much of the state before the chunk each token meets."""
        ...

    @property
    def exit(self) -> Logs:
        """How much of what a token writes is left after the chunk."""
        ...

    @property
    def across(self) -> Float[Tensor, "b c g r channels 1"]:
        """How much of the state before the chunk is left after it."""
        ...

    def product(self, a: Float[Tensor, "b c g 1 chunk n"], b: Float[Tensor, "b c g 1 chunk n"]) -> Scores:
        """Of each a with what is left at it of each b; 0 where that is still to come."""
        ...

    def backward(
        self, grad: Scores, a: Float[Tensor, "b c g 1 chunk n"], b: Float[Tensor, "b c g 1 chunk n"]
    ) -> Factors:
        """From the gradient of `product`."""
        ...

    def gathered(self, log: Keys) -> Logs:
        """What the channels of keys want of the logs, by decay."""
        ...


class PerHead(NamedTuple):
    """One decay for all channels of a head."""

    entry: Logs
    exit: Logs
    across: Float[Tensor, "b c g r 1 1"]
    within: Scores

    @classmethod
    def of(cls, log: Logs, documents: Documents | None) -> "PerHead":
        """From the log decay of each token."""
        found = chunks.Decays.of(log.squeeze(-1), documents)
        return cls(found.entry[..., None], found.exit[..., None], found.across[..., None], found.within)

    def product(self, a: Keys, b: Keys) -> Scores:
        """One matrix product for all heads of a key head."""
        return (a @ b.mT) * self.within

    def backward(self, grad: Scores, a: Keys, b: Keys) -> Factors:
        """See `DeltaDecays`."""
        seen = grad * self.within
        log, shared = seen * (a @ b.mT), seen.sum(3, keepdim=True)
        return Factors(shared @ b, shared.mT @ a, (log.sum(-1) - log.sum(-2))[..., None])

    def gathered(self, log: Keys) -> Logs:
        """The sum."""
        return log.sum(-1, keepdim=True)
