"""Gate statistics: what the values were while somebody watched, by path and branch name."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusiontree.core.contracts.gate import Weights

Real = Bool[Tensor, "batch time"]
"""Where tokens stand, and neither padding nor a prefix."""
BINS = 20
SATURATED = 0.05


@dataclass(frozen=True)
class BranchStatistics:
    """One branch's gate values over real tokens and units.

    Attributes:
        mean: the mean value.
        std: the standard deviation, 0 for a gate that does not move.
        histogram: the share of values in each of 20 equal bins of [0, 1].
        entropy: the mean entropy over the gate's branches, in [0, 1] (1: all branches alike).
        saturated: the share of values within 0.05 of 0 or 1.
        count: how many values were seen.
    """

    mean: float
    std: float
    histogram: tuple[float, ...]
    entropy: float
    saturated: float
    count: int

    def data(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class _Sums:
    """Running sums of one branch, on the device, in float64 so that counts stay exact."""

    sums: Tensor
    histogram: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "_Sums":
        zeros = torch.zeros(5, dtype=torch.float64, device=device)
        return cls(zeros, torch.zeros(BINS, dtype=torch.float64, device=device))

    def add(self, values: Float[Tensor, "n"], entropy: Tensor) -> None:
        saturated = ((values < SATURATED) | (values > 1 - SATURATED)).sum()
        count = values.new_full((), values.numel())
        self.sums += torch.stack([count, values.sum(), values.square().sum(), entropy * count, saturated.double()])
        bins = (values * BINS).long().clamp(0, BINS - 1)
        self.histogram += torch.bincount(bins, minlength=BINS)

    def finish(self) -> BranchStatistics:
        count, total, squares, entropy, saturated = (float(value) for value in self.sums)
        n = max(count, 1.0)
        variance = max(squares / n - (total / n) ** 2, 0.0)
        histogram = tuple(float(share) for share in self.histogram / n)
        return BranchStatistics(total / n, variance**0.5, histogram, entropy / n, saturated / n, int(count))


@dataclass
class Observation(Mapping[str, Mapping[str, BranchStatistics]]):
    """Statistics by gate path, then branch name, of everything seen so far."""

    _gates: dict[str, dict[str, _Sums]] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Mapping[str, BranchStatistics]:
        return {branch: sums.finish() for branch, sums in self._gates[path].items()}

    def __iter__(self):  # noqa: ANN204
        return iter(self._gates)

    def __len__(self) -> int:
        return len(self._gates)

    @torch.no_grad()
    def add(self, path: str, weights: Weights, real: Real | None) -> None:
        """Take note of one evaluation of a gate, where its values are those of tokens."""
        values = {branch: _at_tokens(value, real).double().flatten() for branch, value in weights.items()}
        entropy = _entropy(list(values.values()))
        sums = self._gates.setdefault(path, {})
        for branch, value in values.items():
            if branch not in sums:
                sums[branch] = _Sums.empty(value.device)
            sums[branch].add(value, entropy)

    def tensors(self) -> list[Tensor]:
        """The running sums themselves, for whoever adds up several processes."""
        return [t for gate in self._gates.values() for sums in gate.values() for t in (sums.sums, sums.histogram)]

    def data(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Plain data."""
        return {path: {b: s.data() for b, s in branches.items()} for path, branches in self.items()}


def _at_tokens(value: Tensor, real: Real | None) -> Tensor:
    """The values at tokens, not at padding or a prefix; a gate that does not read tokens has one set of them."""
    return value if value.ndim == 1 or real is None else value[real]


def _entropy(values: list[Tensor]) -> Tensor:
    stacked = torch.stack(values)
    nats = -torch.special.xlogy(stacked, stacked).sum(0)
    return (nats / math.log(len(values))).mean() if stacked.numel() else stacked.sum()
