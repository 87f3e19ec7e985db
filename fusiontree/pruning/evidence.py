"""What a training run says about its gates: the file `gates.json` that the gate monitor writes."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field

from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.probes.gate_statistics import Observation
from fusiontree.core.spec.base import Natural, OrderedMap, Spec
from fusiontree.errors import FusionTreeError, suggest

Share = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6, allow_inf_nan=False)]


class PruneError(FusionTreeError):
    """Evidence, a plan or a pruned model that does not fit the model it is for."""


class BranchEvidence(Spec):
    """One branch's gate values; see `BranchStatistics`."""

    mean: Share
    std: Annotated[float, Field(ge=0)]
    histogram: tuple[Share, ...]
    entropy: Annotated[float, Field(allow_inf_nan=False)]
    saturated: Share
    count: Natural


class Evidence(Spec):
    """Gate statistics by gate path, then branch name, and how they came about."""

    format: Literal[1] = 1
    steps_seen: Natural
    spec: str
    gates: OrderedMap[OrderedMap[BranchEvidence]]

    @classmethod
    def from_observation(cls, observation: Observation, spec: ModelSpec, *, steps_seen: int) -> Self:
        """What `model.observe()` saw."""
        data: dict[str, Any] = {"steps_seen": steps_seen, "spec": spec.digest(), "gates": observation.data()}
        return cls.parse(data)

    def check(self, spec: ModelSpec) -> None:
        """Refuse evidence of another model.

        Raises:
            PruneError: another digest, or gates or branches that the spec does not have.
        """
        if self.spec != spec.digest():
            raise PruneError(f"gates: seen on the spec {self.spec}, this one is {spec.digest()}")
        gates = dict(spec.gates())
        for path, branches in self.gates.items():
            if path not in gates:
                raise PruneError(f"{path}: no gate is there{suggest(path, gates)}")
            known = gates[path].branches
            for name in branches:
                if name not in known:
                    raise PruneError(f"{path}: no branch is called {name!r}{suggest(name, known)}")
