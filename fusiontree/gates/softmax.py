"""The softmax gate: any number of branches, one logit for each."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from fusiontree.components import Context, Gate, GateScope, Positive, Weights, gates
from fusiontree.gates.base import Features, LearnedGateSpec, Logit


@gates.register
class Softmax(LearnedGateSpec):
    """A softmax over any number of branches, at a temperature."""

    kind: Literal["softmax"] = "softmax"
    temperature: Positive = 1.0

    def build(self, scope: GateScope) -> "SoftmaxModule":
        return SoftmaxModule(self, scope)

    def flops(self, scope: GateScope) -> float:
        return len(scope.branches) * self.logit_flops(scope)

    def axes(self, branches: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
        return {k: v for branch in branches for k, v in self.logit_axes(f"logits.{branch}.").items()}


class SoftmaxModule(Gate):
    """The module of `Softmax`; a dropped branch has the logit -inf."""

    def __init__(self, spec: Softmax, scope: GateScope) -> None:
        super().__init__()
        self.temperature = spec.temperature
        self.logits = nn.ModuleDict({branch: Logit(spec, scope) for branch in scope.branches})

    def forward(self, features: Features, context: Context) -> Weights:
        logits = {branch: logit(features) / self.temperature for branch, logit in self.logits.items()}
        open_logits = [x if b not in self.dropped else torch.full_like(x, -torch.inf) for b, x in logits.items()]
        values = torch.stack(open_logits).softmax(0)
        return dict(zip(logits, values, strict=True))
