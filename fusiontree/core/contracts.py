"""What a component promises: the spec classes and modules that branches, fusions, gates and encodings derive from.

Shape letters everywhere: batch, time, width (of the residual stream), inner (of a branch), heads, head_dim,
value_dim, state, groups, branches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fusiontree.core.context import Context, State, Table
from fusiontree.core.modules import Module
from fusiontree.core.registry import OneOf, Registry
from fusiontree.core.spec import Name, NamedMap, Spec
from fusiontree.errors import suggest

Hook = Literal["input", "rotate", "bias"]
Problems = Iterator[tuple[str, str]]
"""Pairs of a path inside the node and what is wrong there."""


@dataclass(frozen=True)
class Scope:
    """What surrounds a node: the width of its input and output, the encodings and shared nodes that it may name, and
    how many learned vectors stand before each document, and the width of the stream, which encodings add to."""

    width: int
    encodings: Mapping[str, "EncodingSpec"]
    shared: Mapping[str, "NodeSpec"] = field(default_factory=dict)
    prefix: int = 0
    stream: int | None = None

    @property
    def for_shared(self) -> "Scope":
        """What surrounds a shared node: it uses no other."""
        return replace(self, shared={})


class NodeSpec(Spec, ABC):
    """A branch or a fusion: something that maps [batch, time, width] to [batch, time, width], causally.

    `rigid` axes have an order that matters; along any other axis parts may change places. `lender_field` is the field
    that holds the path of a node whose `Context.lent` the module reads.
    """

    rigid: ClassVar[frozenset[str]] = frozenset({"width"})
    lender_field: ClassVar[str | None] = None

    @classmethod
    @abstractmethod
    def example(cls, width: int) -> Self:
        """A small valid instance for a stream of this width (a multiple of 8); the laws are tested on it."""

    @abstractmethod
    def build(self, scope: Scope) -> "Node":
        """The module, its parameters not yet initialised (built on the meta device by `build`)."""

    def children(self) -> Iterator[tuple[str, "NodeSpec"]]:
        """The nodes directly inside, each with its path from here."""
        yield from ()

    def around(self, child: str, scope: Scope) -> Scope:
        """What surrounds a node inside, by its path from here."""
        return scope

    def within(self, scope: Scope, path: str = "") -> Iterator[tuple[str, "NodeSpec", Scope]]:
        """This node and all inside, each with its path (that of this one is given) and what surrounds it."""
        yield path, self, scope
        for step, child in self.children():
            yield from child.within(self.around(step, scope), f"{path}.{step}" if path else step)

    def problems(self, scope: Scope) -> Problems:
        """What only the surroundings can show to be wrong."""
        yield from ()

    @classmethod
    def example_needs(cls, width: int) -> Mapping[str, Any]:
        """What a model needs at its top level so that the example can stand in it; `layers` are further ones."""
        return {}

    @property
    def reads_embedding(self) -> bool:
        """Whether the module reads `Context.embedding`."""
        return False

    @property
    def borrows(self) -> str | None:
        """The path of the node of an earlier layer whose `Context.lent` the module reads, if there is one."""
        return None if self.lender_field is None else getattr(self, self.lender_field)

    def refuses(self, lender: "NodeSpec") -> str | None:
        """Why that node's cannot be read, or None."""
        return f"{getattr(lender, 'kind', 'it')} lends nothing"

    @property
    def uses(self) -> str | None:
        """The name of the shared node that runs here, if one does."""
        return None

    def output_width(self, scope: Scope) -> int:
        """The last dimension of what the node returns."""
        return scope.width

    @abstractmethod
    def flops(self, scope: Scope, length: int) -> float:
        """Forward FLOPs per token, children left out: matrix products only (2 per multiply-add), the mean
        over the positions of a sequence of `length` tokens; a scan counts the products of its recurrence. A prefix
        counts among the tokens."""

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """Bytes that one sequence's cache of `length` tokens takes, children left out; a prefix counts among them."""
        return 0

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """What each dimension of each parameter runs over, by parameter name, children left out.

        A dimension is a product of named axes, outermost first ("heads*head_dim"), or a sum of such products
        where parts are concatenated ("local_heads*head_dim+global_heads*head_dim").
        """
        return {}

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        """The size of every axis that `axes` names."""
        return {"width": scope.width}


class BranchSpec(NodeSpec, ABC):
    """A leaf of the tree: attention, a state-space model, a feed-forward network, ..."""

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input"})
    encodings: tuple[Name, ...] = ()

    def channels(self) -> Iterator[int]:
        """The widths that a rotary encoding would have to rotate here."""
        yield from ()

    def problems(self, scope: Scope) -> Problems:
        """Encodings that nobody defined, that have no hook here, or that do not fit."""
        exclusive: dict[Hook, str] = {"rotate": "rotations", "bias": "biases"}
        for hook, what in exclusive.items():
            names = [name for name in self.encodings if _has_hook(scope, name, hook)]
            if len(names) > 1:
                yield "encodings", f"two {what} on one branch: {', '.join(names)}"
        if len(set(self.encodings)) < len(self.encodings):
            yield "encodings", f"each name once, found {', '.join(self.encodings)}"
        for name in self.encodings:
            if name not in scope.encodings:
                yield "encodings", f"no encoding is called {name!r}{suggest(name, scope.encodings)}"
            elif not scope.encodings[name].hooks & self.hooks:
                have = ", ".join(sorted(self.hooks)) or "none"
                wants = ", ".join(sorted(scope.encodings[name].hooks))
                yield "encodings", f"encoding {name!r} needs the hook {wants}; this branch has: {have}"
            elif "input" in scope.encodings[name].hooks and scope.stream not in (None, scope.width):
                found = f"{name!r} is added to features of the stream's width {scope.stream}, here are {scope.width}"
                yield "encodings", found
            else:
                yield from (("encodings", f"{name}: {p}") for p in scope.encodings[name].problems(self.channels()))


def _has_hook(scope: Scope, name: str, hook: Hook) -> bool:
    return name in scope.encodings and hook in scope.encodings[name].hooks


class Node(Module, ABC):
    """The module of a branch or a fusion. The model tells it its `path` in the tree, and its `place` in its layer."""

    path: str = ""
    place: str = ""
    lends: bool = False
    """Whether a node of a later layer borrows from it."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time features"]:
        """Map the stream's (normed) features, honouring the context's boundaries and cache."""
        raise NotImplementedError

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """An empty cache for `batch` rows: room for `capacity` tokens, a prefix among them (None: as many as come)."""
        return {}

    def state(self, context: Context) -> State | None:
        """The cache of this node, None when there is no cache."""
        return None if context.states is None else context.states[self.place]

    def stands(self) -> Iterator["Node"]:
        """The nodes that keep a cache here: this one, and where it uses shared nodes, those in its place."""
        yield self


class Binds(Node, ABC):
    """A node that runs a shared one, to which the model introduces it once both know their paths."""

    @abstractmethod
    def bind(self, shared: nn.ModuleDict) -> None:
        """Find the shared node by its name."""
        raise NotImplementedError

    @abstractmethod
    def is_current(self) -> bool:
        """Whether the shared node is still made of what it was when `bind` found it."""
        raise NotImplementedError


class EncodingSpec(Spec, ABC):
    """A time base that branches share by naming it."""

    hooks: ClassVar[frozenset[Hook]]

    @classmethod
    @abstractmethod
    def example(cls, width: int) -> Self:
        """A small valid instance; the laws are tested on it."""

    @property
    def limit(self) -> int | None:
        """How many positions there are; None: any number."""
        return None

    @abstractmethod
    def build(self, width: int, channels: Sequence[int]) -> "Encoding":
        """The module; `channels` are the widths that branches let it rotate."""

    def problems(self, channels: Iterator[int]) -> Iterator[str]:
        """Why this encoding does not fit a branch that rotates these channels."""
        yield from ()

    def flops(self, width: int) -> float:
        """Forward FLOPs per token of making the table."""
        return 0.0

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """As of a node."""
        return {}

    def sizes(self, width: int) -> Mapping[str, int]:
        """As of a node."""
        return {"width": width}


class Encoding(Module, ABC):
    """The module of an encoding."""

    @abstractmethod
    def forward(self, positions: Int[Tensor, "batch time"]) -> Table:
        """Evaluate the encoding, once for each forward pass of the model."""
        raise NotImplementedError


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
    @abstractmethod
    def example(cls, branches: tuple[str, ...], width: int) -> Self:
        """A small valid instance; the laws are tested on it."""

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

    def without(self, branch: str) -> "GateSpec":
        """The gate of the same fusion less one branch; at least two are left."""
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


class Told(Module):
    """A module that is told of branches that are dropped. What it is told is a dictionary, which is one with that of
    its twins where a shared node is used."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Any] = {}

    @property
    def closed(self) -> frozenset[str]:
        """The names of branches that are dropped for now."""
        return self.told.get("closed", frozenset())

    @closed.setter
    def closed(self, names: frozenset[str]) -> None:
        self.told["closed"] = names


class Gate(Told, ABC):
    """The module of a gate. `closed` branches have the value 0, and the others share theirs."""

    @property
    def forced(self) -> Mapping[str, float] | None:
        """The values that `LanguageModel.force` puts in the place of what the gate returns."""
        return self.told.get("forced")

    @forced.setter
    def forced(self, shares: Mapping[str, float] | None) -> None:
        self.told["forced"] = shares

    @abstractmethod
    def forward(self, features: Float[Tensor, "batch time features"], context: Context) -> Weights:
        """The value of every branch."""
        raise NotImplementedError


class Fusion(Told, Node, ABC):
    """The module of a fusion. `closed` branches count as 0 wherever their features are read."""

    branches: nn.ModuleDict
    gate: Gate | None


def branch_path(fusion: str, branch: str) -> str:
    """The path of a branch, from where the path of its fusion begins."""
    return f"{fusion}.branches.{branch}" if fusion else f"branches.{branch}"


class FusionSpec(NodeSpec, ABC):
    """An inner node of the tree: how sibling branches meet. Its module has them in `branches`, a gate in `gate`."""

    branches: "NamedMap[AnyNode]"

    @property
    def gate_spec(self) -> GateSpec | None:
        """The gate, where the rule has one."""
        return None

    def gate_scope(self, scope: Scope) -> GateScope:
        """What surrounds the gate, by what surrounds the fusion."""
        return GateScope(tuple(self.branches), scope.width, scope.width)

    @abstractmethod
    def without(self, branch: str) -> "FusionSpec":
        """The spec with one branch less and nothing left that only it used (law 8).

        Raises:
            SpecError: the branch is the last one.
        """

    def sole(self) -> str | None:
        """The name of the one branch that the fusion passes on as it is; None if it does anything else."""
        return None


branches: Registry[BranchSpec] = Registry("branch", BranchSpec, home="fusiontree.branches")
fusions: Registry[FusionSpec] = Registry("fusion", FusionSpec, home="fusiontree.fusions")
gates: Registry[GateSpec] = Registry("gate", GateSpec, home="fusiontree.gates")
encodings: Registry[EncodingSpec] = Registry("encoding", EncodingSpec, home="fusiontree.encodings")
nodes: OneOf[NodeSpec] = OneOf("node", NodeSpec, (branches, fusions))

AnyNode = Annotated[NodeSpec, nodes]
"""A field that holds any branch or fusion."""
FusionSpec.model_rebuild()  # whose branches are such fields
AnyGate = Annotated[GateSpec, gates]
"""A field that holds any gate."""
AnyEncoding = Annotated[EncodingSpec, encodings]
"""A field that holds any encoding."""
REGISTRIES: dict[str, Registry[Any]] = {r.name: r for r in (branches, fusions, gates, encodings)}
"""Every family by its name."""
