"""The sum of the branches, each times a constant (Falcon-H1, arXiv 2507.22448)."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import model_validator

from fusiontree.components import NamedMap, Real, Scope, Weights, fusions, invalid, scaled, suggest, total
from fusiontree.fusions.base import BaseFusion, BaseFusionSpec, Fused, example_branches
from fusiontree.fusions.parts import Features


@fusions.register
class Sum(BaseFusionSpec):
    """The sum of the branches, each times a constant.

    sum_i m_i h_i; a branch that `multipliers` does not name has 1.
    """

    kind: Literal["sum"] = "sum"
    multipliers: NamedMap[Real] = NamedMap()

    @model_validator(mode="after")
    def _names_are_branches(self) -> Self:
        for name in self.multipliers:
            if name not in self.branches:
                raise invalid({("multipliers", name): f"no such branch{suggest(name, self.branches)}"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        branches = example_branches(width)
        yield cls.model_validate({"branches": branches, "multipliers": {next(iter(branches)): 0.5}})

    def build(self, scope: Scope) -> "SumModule":
        return SumModule(self, scope)

    def is_identity(self, branch: str) -> bool:
        return self.multipliers.get(branch, 1.0) == 1.0

    def rule_without(self, branch: str, left: int) -> dict[str, Any]:
        return {"multipliers": {name: value for name, value in self.multipliers.items() if name != branch}}


class SumModule(BaseFusion):
    """The module of `Sum`."""

    def __init__(self, spec: Sum, scope: Scope) -> None:
        super().__init__(spec, scope)
        self.multipliers = dict(spec.multipliers)

    def fuse(self, features: Features, weights: Weights) -> Fused:
        return total(scaled(h, self.multipliers.get(name, 1.0)) for name, h in features.items())
