"""The contract of branches, and what branches and fusions share.

Shape letters everywhere: batch, time, width (of the residual stream), inner (of a branch), heads, head_dim,
value_dim, state, groups, branches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fusiontree.core.contracts import axes
from fusiontree.core.contracts.axes import Narrowing
from fusiontree.core.contracts.context import Context, State
from fusiontree.core.contracts.encoding import EncodingSpec, Hook
from fusiontree.core.contracts.examples import by_older_name
from fusiontree.core.contracts.modules import Module
from fusiontree.core.spec.base import Name, Problems, Spec
from fusiontree.core.spec.registry import Registry
from fusiontree.errors import SpecError, suggest


@dataclass(frozen=True)
class Scope:
    """The surroundings of a node: the width of its input and output, the encodings and shared nodes that it may name,
    the number of prefix vectors before each document, and the width of the stream, to which encodings add."""

    width: int
    encodings: Mapping[str, "EncodingSpec"]
    shared: Mapping[str, "NodeSpec"] = field(default_factory=dict)
    prefix: int = 0
    stream: int | None = None

    @property
    def for_shared(self) -> "Scope":
        """The scope of a shared node, without `shared`, because a shared node uses no other."""
        return replace(self, shared={})


class NodeSpec(Spec, ABC):
    """A branch or a fusion: maps [batch, time, width] to [batch, time, width], causally.

    The order of parts matters along `rigid` axes; along any other axis parts may be permuted. Along `plain` axes a
    narrower spec differs only in the field with the axis's name. Parts along `routed` axes are chosen by the scores of
    the module's `router`; parts that are never chosen are silent. `kv_source_field` names the field that holds the path
    of a node of an earlier layer, whose published values the module reads.
    """

    rigid: ClassVar[frozenset[str]] = frozenset({"width"})
    plain: ClassVar[frozenset[str]] = frozenset()
    routed: ClassVar[frozenset[str]] = frozenset()
    kv_source_field: ClassVar[str | None] = None

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Small valid instances for a stream of this width (a multiple of 8), the most informative one first. Tests
        of the laws run on them, and random specs contain them."""
        yield from by_older_name(cls, width)

    @abstractmethod
    def build(self, scope: Scope) -> "Node":
        """The module, its parameters not yet initialised (built on the meta device by `build`)."""

    def children(self) -> Iterator[tuple[str, "NodeSpec"]]:
        """The nodes directly inside, each with its path from here."""
        yield from ()

    def child_scope(self, child: str, scope: Scope) -> Scope:
        """The scope of a node inside, given its path from here."""
        return scope

    def walk(self, scope: Scope, path: str = "") -> Iterator[tuple[str, "NodeSpec", Scope]]:
        """Yields this node and every node inside, each with its path and scope; `path` is this node's."""
        yield path, self, scope
        for step, child in self.children():
            yield from child.walk(self.child_scope(step, scope), f"{path}.{step}" if path else step)

    def problems(self, scope: Scope) -> Problems:
        """Problems that depend on the scope, as pairs of a path from here and a text."""
        yield from ()

    @classmethod
    def example_needs(cls, width: int) -> Mapping[str, Any]:
        """Top-level fields that a model around the example needs; `layers` are added behind the example's."""
        return {}

    @property
    def reads_embedding(self) -> bool:
        """Whether the module reads `Context.embedding`."""
        return False

    @property
    def kv_source(self) -> str | None:
        """The path of the node of an earlier layer whose published values the module reads; None: it reads none."""
        return None if self.kv_source_field is None else getattr(self, self.kv_source_field)

    def sharing_problem(self, source: "NodeSpec") -> str | None:
        """Why this node cannot read the values of the node at `kv_source`; None: it can."""
        return f"{getattr(source, 'kind', 'it')} shares nothing"

    @property
    def uses(self) -> str | None:
        """The name of the shared node that runs here, if one does."""
        return None

    def output_width(self, scope: Scope) -> int:
        """The size of the last dimension of the node's output."""
        return scope.width

    @abstractmethod
    def flops(self, scope: Scope, length: int) -> float:
        """Forward FLOPs per token without children: the mean over the positions of a sequence of `length` tokens, a
        prefix included. Counts matrix products only (2 per multiply-add), and in a scan the products of its
        recurrence."""

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """Bytes of one sequence's cache of `length` tokens (a prefix included), without the caches of children."""
        return 0

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """What each dimension of each parameter runs over, by parameter name; without the parameters of children.

        A dimension is a product of named axes, outermost first ("heads*head_dim"), or a sum of such products
        where parts are concatenated ("local_heads*head_dim+global_heads*head_dim").
        """
        return {}

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        """The size of every axis that `axes` names."""
        return {"width": scope.width}

    def packed(self) -> Mapping[str, Sequence[str]]:
        """Parameters that format 1 stored as one: its name, then today's parameters in the order of their rows (see
        `fusiontree.core.model.formats`)."""
        return {}

    def narrow(self, axis: str, keep: Sequence[int], scope: Scope) -> Narrowing[Self]:
        """The node with only the parts of an axis whose indices are in `keep`.

        With narrowed weights it computes what this node computes while the other parts are silent: their values are
        0 where the next map or norm reads them.

        Raises:
            SpecError: no such axis or indices, or no narrower spec computes the same output.
        """
        sizes = self.sizes(scope)
        kept = axes.checked(axis, keep, sizes)
        return Narrowing(self) if len(kept) == sizes[axis] else self.narrowed(axis, kept, scope)

    def narrowed(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Narrowing[Self]:
        """`narrow` after its checks: the axis exists, and `keep` omits some of its indices."""
        return self.with_fields(self.narrowed_fields(axis, keep, scope), axis, keep)

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """The fields of the narrower spec that differ from the fields of this spec.

        Raises:
            SpecError: no such fields give an exact result.
        """
        if axis in self.plain:
            return {axis: len(keep)}
        ordered = axis in self.rigid and axis != "width"
        reason = "the order of its parts matters" if ordered else "other nodes' parameters run over it"
        raise SpecError(f"{axis}: cannot be narrowed here, {reason}")

    def with_fields(self, fields: Mapping[str, Any], axis: str, keep: tuple[int, ...]) -> Narrowing[Self]:
        """The narrowing along an axis of the node's own parameters, given the fields that differ."""
        return Narrowing(type(self).parse({**self.data(), **fields}), {"": {axis: keep}})

    def narrow_output(self, channels: Sequence[int], scope: Scope) -> Narrowing[Self]:
        """The node that returns only the features `channels` (rising indices), for a parent that narrows their reader.

        Raises:
            SpecError: the output of this node cannot be narrowed.
        """
        raise SpecError("the features that it returns cannot be narrowed")

    def narrow_input(self, channels: Sequence[int], scope: Scope) -> Narrowing[Self]:
        """The node that reads only the features `channels`; its output keeps its width.

        Raises:
            SpecError: the input of this node cannot be narrowed.
        """
        raise SpecError("the features that it reads cannot be narrowed")

    def kept_along(self, dimension: str, axis: str, keep: tuple[int, ...], scope: Scope) -> list[int]:
        """The indices that remain along a dimension when `axis` keeps the indices `keep`."""
        return axes.positions(dimension, self.sizes(scope), {axis: keep}).tolist()


class BranchSpec(NodeSpec, ABC):
    """A leaf of the tree: attention, a state-space model, a feed-forward network, ..."""

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input"})
    encodings: tuple[Name, ...] = ()

    def channels(self) -> Iterator[int]:
        """The numbers of channels that a rotary encoding has to rotate in this branch."""
        yield from ()

    def refuse_with(self, hook: Hook, axis: str, scope: Scope) -> None:
        """Refuse to narrow an axis whose parts the branch's encodings with this hook distinguish.

        Raises:
            SpecError: the branch names an encoding with this hook.
        """
        for name in self.encodings:
            if _has_hook(scope, name, hook):
                raise SpecError(f"{axis}: cannot be narrowed exactly, the encoding {name!r} depends on it")

    def problems(self, scope: Scope) -> Problems:
        """Encodings that are undefined, repeated, in conflict with each other, without a hook here, or do not fit."""
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
    """The module of a branch or a fusion. The model sets its `path`, and its `local_path`, which omits the steps that
    name the layer."""

    path: str = ""
    local_path: str = ""
    is_kv_source: bool = False
    """Whether a node of a later layer reads the values that this one publishes."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time features"]:
        """Map the stream's (normed) features, honouring the context's boundaries and cache."""
        raise NotImplementedError

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """An empty cache for `batch` rows of `capacity` tokens, a prefix included (None: the cache grows)."""
        return {}

    def state(self, context: Context) -> State | None:
        """The cache of this node; None without a cache."""
        return None if context.states is None else context.states[self.local_path]

    def stateful_nodes(self) -> Iterator["Node"]:
        """The nodes with a cache at this place: this node, or the shared nodes that run for it."""
        yield self


class SharedNodeUser(Node, ABC):
    """A node that runs a shared node. The model calls `attach` once both have their paths."""

    @abstractmethod
    def attach(self, shared: nn.ModuleDict) -> None:
        """Find the shared node by its name."""
        raise NotImplementedError

    @abstractmethod
    def is_attached(self) -> bool:
        """Whether the modules of the shared node, and their `forward`, are unchanged since `attach`."""
        raise NotImplementedError


branches: Registry[BranchSpec] = Registry("branch", BranchSpec, home="fusiontree.branches")
