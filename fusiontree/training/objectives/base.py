"""The contract of objectives: one number per row, weighted by the row's share of the step's labels, then summed.

The sums and gradients of all micro-batches and processes add up to those of the step, however the step is cut.
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
        nats: the cross entropy, summed over the labels of the rows.
        labels: the labels; -100 at positions without a label.
        count: the number of labels in the whole step.
        gates: the values of all gates, if an objective reads them.
    """

    nats: Scalar
    labels: Int[Tensor, "rows time"]
    count: Tensor | int
    gates: Sequence[GateValues] = ()

    @property
    def shares(self) -> Float[Tensor, "rows"]:
        """For each row, the number of its labels over the number of labels in the step."""
        return (self.labels != IGNORED).sum(1).to(self.nats.dtype) / self.count


class ObjectiveSpec(Spec, ABC):
    """One term of the loss, times `weight` (0: the term is only measured)."""

    reads_gates: ClassVar[bool] = False
    """Whether the objective needs `StepPart.gates`."""
    weight: NonNegative = 1.0

    @abstractmethod
    def value(self, part: StepPart) -> Scalar:
        """The sum over the rows, each weighted by its share of the step's labels."""


class GateObjectiveSpec(ObjectiveSpec):
    """An objective that computes one number per gate and row, and takes the mean over the gates."""

    reads_gates: ClassVar[bool] = True

    def value(self, part: StepPart) -> Scalar:
        """The weighted sum over the rows, as the mean over the gates; 0 if no gate was captured."""
        shares, nothing = part.shares, torch.zeros_like(part.nats)
        return sum(((self.of_rows(gate) * shares).sum() for gate in part.gates), nothing) / max(len(part.gates), 1)

    @abstractmethod
    def of_rows(self, gate: GateValues) -> Float[Tensor, "*rows"]:
        """The number of one gate for each row, or one number for all rows if the gate reads no tokens."""


objectives: Registry[ObjectiveSpec] = Registry("objective", ObjectiveSpec, home="fusiontree.training.objectives")
"""Every kind of objective, by name."""

AnyObjective = Annotated[ObjectiveSpec, objectives]
"""A field that holds any objective."""


@contextmanager
def captured(gates: Mapping[str, Gate]) -> Generator[list[GateValues]]:
    """Collect the values of gates while a block runs, with the graph for gradients."""
    found: list[GateValues] = []

    def keep(path: str, weights: Weights, real: Real | None) -> None:
        found.append(GateValues(dict(weights), real))

    with watch(gates, keep):
        yield found
