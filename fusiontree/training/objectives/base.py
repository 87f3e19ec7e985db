"""What an objective promises: a number for each row, summed with the row's share of the step's labels as its weight.

So the sum over micro-batches and processes is the value of the whole step, whatever they are, and so are the gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.core.contracts.gate import Gate, Weights
from fusiontree.core.contracts.modules import accumulation_dtype
from fusiontree.core.probes.gate_statistics import Real
from fusiontree.core.probes.probes import watch
from fusiontree.core.spec.base import NonNegative, Spec
from fusiontree.core.spec.registry import Registry
from fusiontree.data import IGNORED

Scalar = Float[Tensor, ""]


@dataclass(frozen=True)
class GateValues:
    """The values of a gate in one forward pass.

    Attributes:
        values: by branch, [rows, time, units] or [units].
        real: mask of real tokens (neither padding nor prefix); None: all positions are real.
    """

    values: Weights
    real: Real | None

    def shares(self) -> Float[Tensor, "*places units branches"]:
        """The values of all branches side by side, in float32 or better."""
        stacked = torch.stack(list(self.values.values()), -1)
        return stacked.to(accumulation_dtype(stacked.dtype))

    def row_means(self, x: Float[Tensor, "*places units some"]) -> Float[Tensor, "*rows units some"]:
        """Means over the real positions of each row. A gate that reads no tokens has the same values for all rows: x is
        returned."""
        if x.ndim == 2:
            return x
        if self.real is None:
            return x.mean(1)
        mask = self.real[..., None, None]
        return torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp_min(1)


@dataclass(frozen=True)
class StepPart:
    """Some rows of a step.

    Attributes:
        nats: the cross entropy of their labels, summed.
        labels: -100 where there is none.
        count: labels of the whole step.
        gates: the values of all gates, if an objective reads them.
    """

    nats: Scalar
    labels: Int[Tensor, "rows time"]
    count: Tensor | int
    gates: Sequence[GateValues] = ()

    @property
    def shares(self) -> Float[Tensor, "rows"]:
        """The share of the step's labels that each row has."""
        return (self.labels != IGNORED).sum(1).to(self.nats.dtype) / self.count


class ObjectiveSpec(Spec, ABC):
    """One term of the loss, times `weight` (0: the term is only measured)."""

    reads_gates: ClassVar[bool] = False
    """Whether it needs `StepPart.gates`."""
    weight: NonNegative = 1.0

    @abstractmethod
    def value(self, part: StepPart) -> Scalar:
        """The sum over the rows, each with its share of the step's labels."""


class GateObjectiveSpec(ObjectiveSpec):
    """An objective that is the mean over the gates of a number of each."""

    reads_gates: ClassVar[bool] = True

    def value(self, part: StepPart) -> Scalar:
        """0 where nothing was captured."""
        shares, nothing = part.shares, torch.zeros_like(part.nats)
        return sum(((self.of_rows(gate) * shares).sum() for gate in part.gates), nothing) / max(len(part.gates), 1)

    @abstractmethod
    def of_rows(self, gate: GateValues) -> Float[Tensor, "*rows"]:
        """The number of one gate in each row, or in all rows at once."""


objectives: Registry[ObjectiveSpec] = Registry("objective", ObjectiveSpec, home="fusiontree.training.objectives")
"""Every kind of objective, by name."""

AnyObjective = Annotated[ObjectiveSpec, objectives]
"""A field that holds any objective."""


@contextmanager
def captured(gates: Mapping[str, Gate]) -> Generator[list[GateValues]]:
    """Collect what these gates give while a block runs, with its graph for gradients."""
    found: list[GateValues] = []

    def keep(path: str, weights: Weights, real: Real | None) -> None:
        found.append(GateValues(dict(weights), real))

    with watch(gates, keep):
        yield found
