"""Gate statistics as evidence: the file `gates.json` that the gate monitor writes, and whether it fits a model."""

from typing import Any, Literal, Self

from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.probes.gate_statistics import GateStatistics, Observation, plain
from fusiontree.core.spec.base import Natural, OrderedMap, Spec
from fusiontree.errors import FusionTreeError, suggest


class PruneError(FusionTreeError):
    """Evidence, a plan or a pruned model that does not fit the model it is for."""


class Evidence(Spec):
    """Gate statistics by gate path, then branch name, and how they came about."""

    format: Literal[1] = 1
    steps_seen: Natural
    spec: str
    gates: OrderedMap[OrderedMap[GateStatistics]]

    @classmethod
    def from_observation(cls, observation: Observation, spec: ModelSpec, *, steps_seen: int) -> Self:
        """What `model.observe()` saw."""
        data: dict[str, Any] = {"steps_seen": steps_seen, "spec": spec.digest(), "gates": plain(observation)}
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
