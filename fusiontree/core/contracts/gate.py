"""The contract of a gate: values for how much of each branch a fusion takes."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from jaxtyping import Float
from torch import Tensor

from fusiontree.core.contracts.context import Context
from fusiontree.core.contracts.examples import by_older_name
from fusiontree.core.contracts.modules import Module
from fusiontree.core.spec.base import Problems, Spec
from fusiontree.core.spec.registry import Registry
from fusiontree.errors import SpecError

Weights = dict[str, Tensor]
"""Gate values by branch name, each [batch, time, units] or [units]; `units` equal groups of the width."""


@dataclass(frozen=True)
class GateScope:
    """What surrounds a gate: the branches it weighs, the width it reads and the width it gates."""

    branches: tuple[str, ...]
    features: int
    width: int


class GateSpec(Spec, ABC):
    """How much of each branch a fusion takes; the values of all branches sum to 1."""

    @classmethod
    def examples(cls, branches: tuple[str, ...], width: int) -> Iterator[Self]:
        """See `NodeSpec.examples`."""
        yield from by_older_name(cls, branches, width)

    @abstractmethod
    def build(self, scope: GateScope) -> "Gate":
        """The module."""

    def problems(self, scope: GateScope) -> Problems:
        """Why the gate does not fit its fusion."""
        yield from ()

    @property
    @abstractmethod
    def reads_features(self) -> bool:
        """Whether the values depend on the input."""

    def units(self, width: int) -> int:
        """How many groups of the width have separate values."""
        return 1

    def without_branch(self, branch: str) -> "GateSpec":
        """The gate after a branch is dropped from the fusion; at least two branches are left."""
        return self

    def flops(self, scope: GateScope) -> float:
        """Forward FLOPs per token."""
        return 0.0

    def axes(self, branches: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
        """See `NodeSpec.axes`; the axes may be `features`, `units` and `rank`."""
        return {}

    def sizes(self, scope: GateScope) -> Mapping[str, int]:
        """See `NodeSpec.sizes`."""
        return {"features": scope.features, "units": self.units(scope.width)}

    def narrow(self, axis: str, keep: tuple[int, ...], scope: GateScope) -> Self:
        """See `NodeSpec.narrow`; the axis exists and is not `units`, which are narrowed with the width
        (`narrow_width`).

        Raises:
            SpecError: no narrower gate gives the same values.
        """
        raise SpecError(f"gate_{axis}: cannot be narrowed here, other nodes' parameters run over it")

    def narrow_width(self, keep: tuple[int, ...], scope: GateScope) -> tuple[Self, tuple[int, ...]]:
        """The gate of a fusion that keeps the channels `keep` of its width, and the units that remain. All remaining
        units have to keep equally many channels.

        Raises:
            SpecError: they keep different numbers of channels.
        """
        units = self.units(scope.width)
        left = Counter(channel * units // scope.width for channel in keep)
        if len(set(left.values())) > 1:
            raise SpecError(f"gate: its {units} groups would not stay equal")
        return self.with_units(len(left)), tuple(left)

    def with_units(self, units: int) -> Self:
        """The gate with `units` groups; the gate itself where one value serves the whole width."""
        return self


class Probed(Module):
    """Holds what `drop` and `force` set. Clones of a shared node share this dictionary, so setting it once reaches all
    of them."""

    def __init__(self) -> None:
        super().__init__()
        self.probe_state: dict[str, Any] = {}

    @property
    def dropped(self) -> frozenset[str]:
        """The names of branches that are dropped for now."""
        return self.probe_state.get("dropped", frozenset())

    @dropped.setter
    def dropped(self, names: frozenset[str]) -> None:
        self.probe_state["dropped"] = names


class Gate(Probed, ABC):
    """The module of a gate. `dropped` branches have the value 0; the other values sum to 1."""

    @property
    def forced(self) -> Mapping[str, float] | None:
        """The values with which `LanguageModel.force` replaces the output of the gate; None: the gate is not forced."""
        return self.probe_state.get("forced")

    @forced.setter
    def forced(self, shares: Mapping[str, float] | None) -> None:
        self.probe_state["forced"] = shares

    @abstractmethod
    def forward(self, features: Float[Tensor, "batch time features"], context: Context) -> Weights:
        """The value of every branch."""
        raise NotImplementedError


gates: Registry[GateSpec] = Registry("gate", GateSpec, home="fusiontree.gates")

AnyGate = Annotated[GateSpec, gates]
"""A field that holds any gate."""
