"""The sparsemax gate: the shares nearest to the logits, so that a branch far behind the others gets exactly 0.

Martins and Astudillo, From softmax to sparsemax, arXiv 1602.02068, algorithm 1.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fusiontree.components import Context, Gate, GateScope, Weights, accumulation_dtype, gates
from fusiontree.gates.base import Features, LearnedGateSpec, Logit


@gates.register
class Sparsemax(LearnedGateSpec):
    """A softmax that can close branches fully. Of two branches it is a hard sigmoid."""

    kind: Literal["sparsemax"] = "sparsemax"

    def build(self, scope: GateScope) -> "SparsemaxModule":
        """The module."""
        return SparsemaxModule(self, scope)

    def flops(self, scope: GateScope) -> float:
        """A logit for each branch and unit."""
        return len(scope.branches) * self.logit_flops(scope)

    def axes(self, branches: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
        """The axes of every branch's logit."""
        return {name: axes for branch in branches for name, axes in self.logit_axes(f"logits.{branch}.").items()}


class SparsemaxModule(Gate):
    """The module of `Sparsemax`; a dropped branch has the logit -inf."""

    def __init__(self, spec: Sparsemax, scope: GateScope) -> None:
        super().__init__()
        self.logits = nn.ModuleDict({branch: Logit(spec, scope) for branch in scope.branches})

    def forward(self, features: Features, context: Context) -> Weights:
        """Every branch's values."""
        logits = {branch: logit(features) for branch, logit in self.logits.items()}
        open_logits = [x if b not in self.dropped else torch.full_like(x, -torch.inf) for b, x in logits.items()]
        return dict(zip(logits, sparsemax(torch.stack(open_logits)), strict=True))


def sparsemax(logits: Float[Tensor, "branches ..."]) -> Float[Tensor, "branches ..."]:
    """Shares that sum to 1 over the first dimension: max(0, logit - threshold).

    >>> sparsemax(torch.tensor([0.2, 0.0, -3.0]))
    tensor([0.6000, 0.4000, 0.0000])
    """
    ordered, _ = logits.to(accumulation_dtype(logits.dtype)).sort(dim=0, descending=True)
    sums = ordered.cumsum(0)
    counts = torch.arange(1, len(logits) + 1, device=logits.device).reshape(-1, *[1] * (logits.ndim - 1))
    support = (1 + counts * ordered > sums).sum(0, keepdim=True)
    threshold = (sums.gather(0, support - 1) - 1) / support
    return (logits - threshold).clamp(min=0).to(logits.dtype)
