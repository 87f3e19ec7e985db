"""What is minimised: cross entropy, and what may be asked of gates beside it.

Every term is a sum over rows, each row with its share of the step's labels as its weight. So the sum over
micro-batches and processes is the value of the whole step, whatever they are, and so are the gradients.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.core.contracts.gate import Gate, Weights
from fusiontree.core.contracts.modules import wide
from fusiontree.core.probes.gate_statistics import Real
from fusiontree.core.probes.probes import watch
from fusiontree.data import IGNORED
from fusiontree.training.sections import LossesSpec

Scalar = Float[Tensor, ""]
Rows = Float[Tensor, "rows"]


@dataclass(frozen=True)
class GateValues:
    """What a gate gave in one forward pass.

    Attributes:
        values: by branch, [rows, time, units] or [units].
        real: which positions are tokens, and neither padding nor a prefix; None: all of them.
    """

    values: Weights
    real: Real | None


@dataclass(frozen=True)
class Terms:
    """The parts of the objective, each already divided by the labels of the whole step.

    Attributes:
        cross_entropy: nats per label.
        balance: see `balance`, the mean over gates; 0 where nothing was captured.
        entropy: see `entropy`, likewise.
    """

    cross_entropy: Scalar
    balance: Scalar
    entropy: Scalar

    def total(self, weights: LossesSpec) -> Scalar:
        """What is minimised."""
        return self.cross_entropy + weights.balance * self.balance + weights.entropy * self.entropy


def terms(
    nats: Scalar, labels: Int[Tensor, "rows time"], count: Tensor | int, gates: Sequence[GateValues] = ()
) -> Terms:
    """The parts for some rows of a step that has `count` labels in all; `nats`: the cross entropy of these rows' ones,
    summed."""
    shares = (labels != IGNORED).sum(1).to(nats.dtype) / count
    nothing = torch.zeros_like(nats)
    return Terms(
        cross_entropy=nats / count,
        balance=sum((_row_balance(g, shares) for g in gates), nothing) / max(len(gates), 1),
        entropy=sum((_row_entropy(g, shares) for g in gates), nothing) / max(len(gates), 1),
    )


def balance(means: Float[Tensor, "*rows branches"]) -> Float[Tensor, "*rows"]:
    """n times the sum of the squared means of n branches, less 1: 0 for equal shares, n - 1 for one alone.

    The coefficient of variation squared of Shazeer et al. (arXiv 1701.06538), taken over each row as the
    sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437), so that it is the same under any cut of a step.
    """
    return means.shape[-1] * means.square().sum(-1) - 1


def entropy(values: Float[Tensor, "*places branches"]) -> Float[Tensor, "*places"]:
    """The entropy of the branches' shares, 1 where they are equal and 0 where one has all."""
    smallest = torch.finfo(values.dtype).tiny  # a share of exactly 0 has a finite gradient
    nats = -(values * values.clamp_min(smallest).log()).sum(-1)
    return nats / math.log(max(values.shape[-1], 2))


def _row_balance(gate: GateValues, shares: Rows) -> Scalar:
    return (balance(_row_means(_stacked(gate), gate.real).mean(-2)) * shares).sum()


def _row_entropy(gate: GateValues, shares: Rows) -> Scalar:
    return (_row_means(entropy(_stacked(gate))[..., None], gate.real).mean((-2, -1)) * shares).sum()


def _stacked(gate: GateValues) -> Float[Tensor, "*places units branches"]:
    stacked = torch.stack(list(gate.values.values()), -1)
    return stacked.to(wide(stacked.dtype))


def _row_means(
    values: Float[Tensor, "*places units branches"], real: Real | None
) -> Float[Tensor, "*rows units branches"]:
    """Means over the real positions of each row; a gate that reads no tokens has one value for all rows."""
    if values.ndim == 2:
        return values
    if real is None:
        return values.mean(1)
    mask = real[..., None, None]
    return torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp_min(1)


@contextmanager
def captured(gates: Mapping[str, Gate]) -> Iterator[list[GateValues]]:
    """Collect what these gates give while a block runs, with its graph for gradients."""
    found: list[GateValues] = []

    def keep(path: str, weights: Weights, real: Real | None) -> None:
        found.append(GateValues(dict(weights), real))

    with watch(gates, keep):
        yield found
