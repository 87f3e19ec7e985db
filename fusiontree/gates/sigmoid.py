"""The sigmoid gate of two branches: g for the first, 1 - g for the second."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from fusiontree.components import Context, Gate, GateScope, Problems, Weights, gates
from fusiontree.gates.base import Features, LearnedGateSpec, Logit


class TwoWayGateSpec(LearnedGateSpec):
    """A gate of exactly two branches; its value belongs to the first."""

    def problems(self, scope: GateScope) -> Problems:
        yield from super().problems(scope)
        if len(scope.branches) != 2:
            kind = getattr(self, "kind", "this gate")
            yield "kind", f"{kind!r} weighs two branches, found {len(scope.branches)}; softmax takes any number"

    def flops(self, scope: GateScope) -> float:
        return self.logit_flops(scope)

    def axes(self, branches: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
        return self.logit_axes("logit.")


@gates.register
class Sigmoid(TwoWayGateSpec):
    """A sigmoid for two branches: g for the first, 1 - g for the second."""

    kind: Literal["sigmoid"] = "sigmoid"

    def build(self, scope: GateScope) -> "TwoWayGate":
        return SigmoidModule(self, scope)


class TwoWayGate(Gate):
    """Values g and 1 - g from one logit."""

    def __init__(self, spec: TwoWayGateSpec, scope: GateScope) -> None:
        super().__init__()
        self.branches = scope.branches
        self.logit = Logit(spec, scope)

    def value(self, logit: Tensor) -> Tensor:
        """The first branch's value."""
        raise NotImplementedError

    def forward(self, features: Features, context: Context) -> Weights:
        first, second = self.branches
        g = self.value(self.logit(features))
        if self.dropped:
            g = g.new_full(g.shape, float(second in self.dropped))
        return {first: g, second: 1 - g}


class SigmoidModule(TwoWayGate):
    """The module of `Sigmoid`."""

    def value(self, logit: Tensor) -> Tensor:
        return logit.sigmoid()
