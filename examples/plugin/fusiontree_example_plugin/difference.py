"""The difference of branches: one is subtracted from the others, channel by channel as much as is learned.

In a parallel hybrid, subtracting did better than adding once the branches are normalised (Bae et al., arXiv
2510.04800); what two branches have in common cancels, as between the two maps of Ye et al., arXiv 2410.05258.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from fusiontree.components import Name, Scope, Weights, constant, fusions, invalid, suggest, total
from fusiontree.fusions.base import BaseFusion, BaseFusionSpec, Fused, example_branches
from fusiontree.fusions.parts import Features

START = 0.5


@fusions.register
class Difference(BaseFusionSpec):
    """The sum of all branches but `minus`, less lambda times that one. Lambda is learned for each channel and starts
    at 0.5. Once `minus` has been pruned it is null, and the others' sum is left."""

    kind: Literal["difference"] = "difference"
    minus: Name | None

    @model_validator(mode="after")
    def _minus_is_a_branch(self) -> Self:
        if self.minus is not None and self.minus not in self.branches:
            raise invalid({("minus",): f"no branch is called {self.minus!r}{suggest(self.minus, self.branches)}"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Two branches."""
        branches = example_branches(width)
        yield cls.model_validate({"branches": branches, "minus": list(branches)[-1]})

    def build(self, scope: Scope) -> "DifferenceModule":
        """The module."""
        return DifferenceModule(self, scope)

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """The parts' axes, and one value for each fused channel."""
        return {**super().axes(), **({"scale": ("fused_width",)} if self.minus else {})}

    def is_identity(self, branch: str) -> bool:
        return branch != self.minus

    def rule_without(self, branch: str, left: int) -> dict[str, Any]:
        return {"minus": None} if branch == self.minus else {}


class DifferenceModule(BaseFusion):
    """The module of `Difference`; `scale` is lambda."""

    def __init__(self, spec: Difference, scope: Scope) -> None:
        super().__init__(spec, scope)
        self.minus = spec.minus
        self.scale = self.declare("scale", (spec.fused_width(scope),), constant(START)) if spec.minus else None

    def fuse(self, features: Features, weights: Weights) -> Fused:
        """The difference."""
        if self.scale is None:
            return total(features.values())
        return total(-self.scale * h if name == self.minus else h for name, h in features.items())
