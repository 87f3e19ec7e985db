"""What a fusion promises: an inner node of the tree, where sibling branches meet."""

from abc import ABC, abstractmethod
from typing import Annotated

from torch import nn

from fusiontree.core.contracts.gate import Gate, GateScope, GateSpec, Probed
from fusiontree.core.contracts.node import Node, NodeSpec, Scope, branches
from fusiontree.core.spec.base import NamedMap
from fusiontree.core.spec.registry import OneOf, Registry


class Fusion(Probed, Node, ABC):
    """The module of a fusion. `dropped` branches count as 0 wherever their features are read."""

    branches: nn.ModuleDict
    gate: Gate | None


def branch_path(fusion: str, branch: str) -> str:
    """The path of a branch, given the path of its fusion; both start at the same part."""
    return f"{fusion}.branches.{branch}" if fusion else f"branches.{branch}"


class FusionSpec(NodeSpec, ABC):
    """An inner node of the tree: how sibling branches meet. Its module has attributes `branches` and `gate`."""

    branches: "NamedMap[AnyNode]"

    @property
    def gate_spec(self) -> GateSpec | None:
        """The spec of the gate; None: the fusion has no gate."""
        return None

    def gate_scope(self, scope: Scope) -> GateScope:
        """The gate's scope, from the fusion's scope."""
        return GateScope(tuple(self.branches), scope.width, scope.width)

    @abstractmethod
    def without_branch(self, branch: str) -> "FusionSpec":
        """The spec without a branch, and without everything that only this branch used (law 8).

        Raises:
            SpecError: the branch is the last one.
        """

    def passthrough_branch(self) -> str | None:
        """The name of the only branch, if the fusion returns its output unchanged; else None."""
        return None


fusions: Registry[FusionSpec] = Registry("fusion", FusionSpec, home="fusiontree.fusions")
nodes: OneOf[NodeSpec] = OneOf("node", NodeSpec, (branches, fusions))

AnyNode = Annotated[NodeSpec, nodes]
"""A field that holds any branch or fusion."""
FusionSpec.model_rebuild()  # its `branches` are such fields
