"""Statistics of observed gate values, by gate path and branch name."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from fusiontree.core.contracts.gate import Weights
from fusiontree.core.spec.base import Natural, Spec

Real = Bool[Tensor, "batch time"]
"""True at tokens, False at padding and at a prefix."""
Share = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6, allow_inf_nan=False)]
BINS = 20
SATURATED = 0.05


class GateStatistics(Spec):
    """Statistics of one branch's gate values, over real tokens and units. `observe` returns them, the monitor pools
    them, `gates.json` stores them and pruning reads them. `pooled` combines several observations.

    Attributes:
        mean: the mean value.
        std: the standard deviation, 0 for a gate of constant value.
        histogram: the share of values in each of 20 equal bins of [0, 1].
        entropy: the mean entropy over the gate's branches, in [0, 1] (1: equal values for all branches).
        saturated: the share of values within 0.05 of 0 or 1.
        count: how many values were seen.
    """

    mean: Share
    std: Annotated[float, Field(ge=0)]
    histogram: tuple[Share, ...]
    entropy: Annotated[float, Field(allow_inf_nan=False)]
    saturated: Share
    count: Natural

    @classmethod
    def pooled(cls, parts: Iterable[Self]) -> Self:
        """The statistics of all values together: means weighted by counts; the variance is the variance of the means
        plus the mean of the variances."""
        parts = list(parts)
        count = sum(part.count for part in parts)
        shares = [part.count / max(count, 1) for part in parts]

        def mean(values: Iterable[float]) -> float:
            return sum(share * value for share, value in zip(shares, values, strict=True))

        center = mean(part.mean for part in parts)
        variance = mean(part.std**2 + (part.mean - center) ** 2 for part in parts)
        return cls.model_construct(
            mean=center,
            std=variance**0.5,
            histogram=tuple(mean(values) for values in zip(*(part.histogram for part in parts), strict=True)),
            entropy=mean(part.entropy for part in parts),
            saturated=mean(part.saturated for part in parts),
            count=count,
        )


ByGate = Mapping[str, Mapping[str, GateStatistics]]
"""Statistics by gate path, then branch name."""


def pooled(parts: Iterable[ByGate]) -> ByGate:
    """Combine several observations into one."""
    found: dict[str, dict[str, list[GateStatistics]]] = {}
    for part in parts:
        for path, branches in part.items():
            for branch, statistics in branches.items():
                found.setdefault(path, {}).setdefault(branch, []).append(statistics)
    return {path: {b: GateStatistics.pooled(each) for b, each in gate.items()} for path, gate in found.items()}


def plain(gates: ByGate) -> dict[str, dict[str, dict[str, Any]]]:
    """Statistics as plain data; JSON stores them without rounding."""
    return {path: {branch: s.data() for branch, s in branches.items()} for path, branches in gates.items()}


def parsed(data: Mapping[str, Mapping[str, Any]]) -> ByGate:
    """Statistics from plain data; the inverse of `plain`."""
    return {
        path: {branch: GateStatistics.parse(s) for branch, s in branches.items()} for path, branches in data.items()
    }


@dataclass
class Observation(ByGate):
    """Statistics of all values added so far: running sums on the device, in float64 so that counts are exact."""

    sums: dict[str, dict[str, Float[Tensor, "sums"]]] = field(default_factory=dict)
    """For each gate and branch: count, sums of values, squares and entropies, saturated count, and count per bin."""

    def __getitem__(self, path: str) -> Mapping[str, GateStatistics]:
        return {branch: _finished(sums) for branch, sums in self.sums[path].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    @torch.no_grad()
    def add(self, path: str, weights: Weights, real: Real | None) -> None:
        """Add one evaluation of a gate, at real tokens only."""
        values = {branch: _at_tokens(value, real).double().flatten() for branch, value in weights.items()}
        entropy = _entropy(list(values.values()))
        gate = self.sums.setdefault(path, {})
        for branch, value in values.items():
            found = _sums(value, entropy)
            gate[branch] = gate[branch] + found if branch in gate else found

    def tensors(self) -> list[Float[Tensor, "sums"]]:
        """The running sums, for a reduction over processes in place."""
        return [sums for gate in self.sums.values() for sums in gate.values()]


def _sums(values: Float[Tensor, "n"], entropy: Float[Tensor, ""]) -> Float[Tensor, "sums"]:
    saturated = ((values < SATURATED) | (values > 1 - SATURATED)).sum()
    count = values.new_full((), values.numel())
    moments = torch.stack([count, values.sum(), values.square().sum(), entropy * count, saturated.double()])
    bins = torch.bincount((values * BINS).long().clamp(0, BINS - 1), minlength=BINS)
    return torch.cat([moments, bins.double()])


def _finished(sums: Float[Tensor, "sums"]) -> GateStatistics:
    """Statistics from running sums; not validated, because gate values may be NaN."""
    count, total, squares, entropy, saturated, *bins = sums.tolist()
    n = max(count, 1.0)
    return GateStatistics.model_construct(
        mean=total / n,
        std=max(squares / n - (total / n) ** 2, 0.0) ** 0.5,
        histogram=tuple(found / n for found in bins),
        entropy=entropy / n,
        saturated=saturated / n,
        count=int(count),
    )


def _at_tokens(value: Tensor, real: Real | None) -> Tensor:
    """The values at tokens, without padding and prefixes; all values of a gate that reads no tokens."""
    return value if value.ndim == 1 or real is None else value[real]


def _entropy(values: list[Tensor]) -> Tensor:
    stacked = torch.stack(values)
    nats = -torch.special.xlogy(stacked, stacked).sum(0)
    return (nats / math.log(len(values))).mean() if stacked.numel() else stacked.sum()
