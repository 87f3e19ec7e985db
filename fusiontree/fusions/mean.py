"""The mean of the branches (Hymba, arXiv 2411.13676)."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from fusiontree.components import Count, Scope, Weights, fusions, total
from fusiontree.fusions.base import BaseFusion, BaseFusionSpec, Fused, example_branches
from fusiontree.fusions.parts import Features


@fusions.register
class Mean(BaseFusionSpec):
    """The mean of the branches.

    sum_i h_i / over; `over` is the number of branches unless some have been pruned.
    """

    kind: Literal["mean"] = "mean"
    over: Count | None = None

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        yield cls(branches=example_branches(width))

    @property
    def divisor(self) -> int:
        """What the sum is divided by."""
        return self.over or len(self.branches)

    def build(self, scope: Scope) -> "MeanModule":
        return MeanModule(self, scope)

    def is_identity(self, branch: str) -> bool:
        return self.divisor == 1

    def rule_without(self, branch: str, left: int) -> dict[str, Any]:
        return {"over": self.divisor}


class MeanModule(BaseFusion):
    """The module of `Mean`."""

    def __init__(self, spec: Mean, scope: Scope) -> None:
        super().__init__(spec, scope)
        self.divisor = spec.divisor

    def fuse(self, features: Features, weights: Weights) -> Fused:
        return total(features.values()) / self.divisor
