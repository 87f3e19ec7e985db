"""The constant gate: values written in the spec."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import model_validator

from fusiontree.components import (
    Context,
    Gate,
    GateScope,
    GateSpec,
    NamedMap,
    Problems,
    Real,
    Weights,
    gates,
    invalid,
    suggest,
)
from fusiontree.gates.base import Features


@gates.register
class Constant(GateSpec):
    """Shares written in the spec: `values` gives every branch one, and they sum to 1."""

    kind: Literal["constant"] = "constant"
    values: NamedMap[Real]

    @model_validator(mode="after")
    def _shares(self) -> Self:
        total = sum(self.values.values())
        if min(self.values.values(), default=0) < 0 or abs(total - 1) > 1e-6:
            found = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
            raise invalid({("values",): f"shares are at least 0 and sum to 1, found {found or 'none'}"})
        return self

    @classmethod
    def examples(cls, branches: tuple[str, ...], width: int) -> Iterator[Self]:
        weights = range(1, len(branches) + 1)
        yield cls(values=NamedMap({b: w / sum(weights) for b, w in zip(branches, weights, strict=True)}))

    def build(self, scope: GateScope) -> "ConstantModule":
        return ConstantModule(self)

    @property
    def reads_features(self) -> bool:
        return False

    def problems(self, scope: GateScope) -> Problems:
        """Names that are not those of the branches."""
        for name in self.values:
            if name not in scope.branches:
                yield f"values.{name}", f"no such branch{suggest(name, scope.branches)}"
        missing = [name for name in scope.branches if name not in self.values]
        if missing:
            yield "values", f"every branch needs a share, found none for {', '.join(missing)}"

    def without_branch(self, branch: str) -> "Constant":
        """The others' shares, grown to sum to 1."""
        return Constant(values=NamedMap(renormalised({n: v for n, v in self.values.items() if n != branch})))


def renormalised(values: dict[str, float]) -> dict[str, float]:
    """Shares scaled to sum to 1; equal shares if all are 0."""
    total = sum(values.values())
    return {name: value / total if total else 1 / len(values) for name, value in values.items()}


class ConstantModule(Gate):
    """The module of `Constant`; dropped branches leave their share to the others."""

    def __init__(self, spec: Constant) -> None:
        super().__init__()
        self.values = dict(spec.values)

    def forward(self, features: Features, context: Context) -> Weights:
        open_shares = renormalised({name: value for name, value in self.values.items() if name not in self.dropped})
        return {name: features.new_full((1,), open_shares.get(name, 0.0)) for name in self.values}
