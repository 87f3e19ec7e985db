"""The hard concrete gate (arXiv 1712.01312): a stretched sigmoid, cut to [0, 1], that can close fully."""

from typing import Literal

import torch
from torch import Tensor

from fusiontree.components import GateScope, Positive, gates
from fusiontree.gates.sigmoid import TwoWayGate, TwoWayGateSpec

LOW, HIGH = -0.1, 1.1


@gates.register
class HardConcrete(TwoWayGateSpec):
    """A stretched, cut sigmoid for two branches that can close one fully.

    Noisy in training (the paper's equation 10), deterministic otherwise (equation 13).
    """

    kind: Literal["hard_concrete"] = "hard_concrete"
    temperature: Positive = 2 / 3

    def build(self, scope: GateScope) -> "HardConcreteModule":
        return HardConcreteModule(self, scope)


class HardConcreteModule(TwoWayGate):
    """The module of `HardConcrete`; its noise comes from torch's global generator."""

    def __init__(self, spec: HardConcrete, scope: GateScope) -> None:
        super().__init__(spec, scope)
        self.temperature = spec.temperature

    def value(self, logit: Tensor) -> Tensor:
        """A sample while training, else the deterministic value."""
        if self.training:
            uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            logit = (torch.logit(uniform) + logit) / self.temperature
        return (logit.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
