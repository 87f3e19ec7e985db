"""How gate statistics become decisions. A mean gate is not an importance by itself: a branch whose output is scaled
up can have any gate value (see the documentation of pruning); these policies use it nevertheless, and state it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusiontree.core.contracts.fusion import branch_path
from fusiontree.core.spec.base import Count, Natural, Spec, invalid
from fusiontree.core.spec.registry import Registry
from fusiontree.pruning.evidence import Evidence, PruneError


class Decision(Spec):
    """The decision about one branch, with the reason."""

    path: str
    mean: float
    drop: bool
    reason: str


class PolicySpec(Spec, ABC):
    """A rule that decides on every branch that has a gate."""

    @abstractmethod
    def decide(self, evidence: Evidence) -> list[Decision]:
        """A decision for each branch, in the order of the tree.

        Raises:
            PruneError: the evidence is not enough for this policy.
        """


policies: Registry[PolicySpec] = Registry("policy", PolicySpec)
Policy = Annotated[PolicySpec, policies]
"""A field that holds any policy."""
Share = Annotated[float, Field(strict=True, ge=0, le=1)]


def branches(evidence: Evidence) -> Iterator[tuple[str, str, float]]:
    """Gate path, branch path and mean gate value of every branch; those of shared nodes can only go with all uses."""
    for gate, values in evidence.gates.items():
        if gate.startswith("shared."):
            continue
        fusion = gate.removesuffix(".gate")
        yield from ((gate, branch_path(fusion, name), statistics.mean) for name, statistics in values.items())


@policies.register
class Threshold(PolicySpec):
    """Drop the branches of a gate whose mean is below `low`, and all others where one's mean is above `high`;
    only after `min_steps` optimiser steps."""

    kind: Literal["threshold"] = "threshold"
    high: Share = 0.8
    low: Share = 0.2
    min_steps: Natural = 500

    @model_validator(mode="after")
    def _ordered(self) -> "Threshold":
        if self.low >= self.high:
            raise invalid({("low",): f"expected a number below high ({self.high}), found {self.low}"})
        return self

    def decide(self, evidence: Evidence) -> list[Decision]:
        """One branch of each gate, that with the largest mean, always stays."""
        if evidence.steps_seen < self.min_steps:
            found = f"the gates were seen for {evidence.steps_seen} steps"
            raise PruneError(f"policy threshold: {found}, min_steps is {self.min_steps}")
        best: dict[str, tuple[float, str]] = {}
        for gate, path, mean in branches(evidence):
            best[gate] = max(best.get(gate, (-1.0, "")), (mean, path))
        return [self._decision(path, mean, best[gate]) for gate, path, mean in branches(evidence)]

    def _decision(self, path: str, mean: float, best: tuple[float, str]) -> Decision:
        if path == best[1]:
            return Decision(path=path, mean=mean, drop=False, reason="the largest mean of its gate")
        if mean < self.low:
            return Decision(path=path, mean=mean, drop=True, reason=f"mean below {self.low}")
        if best[0] > self.high:
            return Decision(path=path, mean=mean, drop=True, reason=f"another's mean is above {self.high}")
        return Decision(path=path, mean=mean, drop=False, reason=f"mean between {self.low} and {self.high}")


@policies.register
class TopK(PolicySpec):
    """Drop the `count` branches with the smallest means; the last branch of a fusion stays."""

    kind: Literal["topk"] = "topk"
    count: Count

    def decide(self, evidence: Evidence) -> list[Decision]:
        """Ties go to the branch that comes first in the tree."""
        dropped: list[str] = []
        left = {gate: len(values) for gate, values in evidence.gates.items()}
        for gate, path, _ in sorted(branches(evidence), key=lambda item: item[2]):
            if len(dropped) < self.count and left[gate] > 1:
                left[gate] -= 1
                dropped.append(path)
        if len(dropped) < self.count:
            raise PruneError(f"policy topk: {self.count} branches to drop, at most {len(dropped)} can go")
        return [self._decision(path, mean, path in dropped) for _, path, mean in branches(evidence)]

    def _decision(self, path: str, mean: float, drop: bool) -> Decision:
        reason = f"among the {self.count} smallest means" if drop else "a larger mean, or the last of its fusion"
        return Decision(path=path, mean=mean, drop=drop, reason=reason)
