"""What a gate promises: how much of each branch."""

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
    """How much of each branch; the values of all branches sum to 1."""

    @classmethod
    def examples(cls, branches: tuple[str, ...], width: int) -> Iterator[Self]:
        """As of a node."""
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
        """How many groups of the width have a value of their own."""
        return 1

    def without_branch(self, branch: str) -> "GateSpec":
        """The gate after a branch is dropped from the fusion; at least two branches are left."""
        return self

    def flops(self, scope: GateScope) -> float:
        """Forward FLOPs per token."""
        return 0.0

    def axes(self, branches: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
        """As of a node; features, units and rank may be named."""
        return {}

    def sizes(self, scope: GateScope) -> Mapping[str, int]:
        """As of a node."""
        return {"features": scope.features, "units": self.units(scope.width)}

    def narrow(self, axis: str, keep: tuple[int, ...], scope: GateScope) -> Self:
        """See `NodeSpec.narrow`; the axis exists and is not `units`, which are narrowed with the width
        (`narrow_width`).

        Raises:
            SpecError: no narrower gate gives the same values.
        """
        raise SpecError(f"gate_{axis}: cannot be narrowed here, other nodes' parameters run over it")

    def narrow_width(self, keep: tuple[int, ...], scope: GateScope) -> tuple[Self, tuple[int, ...]]:
        """The gate of a fusion that keeps these channels of its width, and which units stay. Units lose equally many
        channels, or all.

        Raises:
            SpecError: they do not.
        """
        units = self.units(scope.width)
        left = Counter(channel * units // scope.width for channel in keep)
        if len(set(left.values())) > 1:
            raise SpecError(f"gate: its {units} groups would not stay equal")
        return self.with_units(len(left)), tuple(left)

    def with_units(self, units: int) -> Self:
        """The gate of so many groups, each with a value of its own; where it has one for all, itself."""
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
    """The module of a gate. `dropped` branches have the value 0, and the others share theirs."""

    @property
    def forced(self) -> Mapping[str, float] | None:
        """The values that `LanguageModel.force` puts in the place of what the gate returns."""
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
