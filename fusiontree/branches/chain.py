"""A sequence of nodes as one branch: a block whose inner nodes do not read or write the stream."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from fusiontree.components import (
    AnyNode,
    BranchSpec,
    Context,
    Flag,
    Hook,
    NamedMap,
    Narrowing,
    Node,
    NodeSpec,
    Norm,
    NormModule,
    Scope,
    branches,
    invalid,
    suggest,
)

Stream = Float[Tensor, "batch time width"]


@branches.register
class Chain(BranchSpec):
    """A sequence of nodes; each reads the output of the one before.

    Attributes:
        links: the nodes in order; inner widths are free, the last node returns the stream's width.
        norms: applied to a link's input, by the link's name.
        embedding: the first link reads the embedding beside its input, in a stream twice its width (Zamba,
            arXiv 2405.16712).
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset()
    kind: Literal["chain"] = "chain"
    links: Annotated[NamedMap[AnyNode], Field(min_length=1)]
    norms: NamedMap[Norm] = NamedMap()
    embedding: Flag = False

    @model_validator(mode="after")
    def _norms_stand_before_links(self) -> Self:
        for name in self.norms:
            if name not in self.links:
                raise invalid({("norms", name): f"no link is called {name!r}{suggest(name, self.links)}"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Attention over stream and embedding, a map back to the stream's width, and a feed-forward network."""
        attention = {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 4, "window": 4, "project": False}
        links = {
            "attention": attention,
            "out": {"kind": "linear", "outputs": width},
            "mlp": {"kind": "mlp", "hidden": 8},
        }
        yield cls.model_validate({"links": links, "norms": {"attention": {}, "mlp": {}}, "embedding": True})

    @property
    def reads_embedding(self) -> bool:
        return self.embedding

    def children(self) -> Iterator[tuple[str, NodeSpec]]:
        yield from ((f"links.{name}", node) for name, node in self.links.items())

    def child_scope(self, child: str, scope: Scope) -> Scope:
        """Each link has its own input width. Shared nodes have the stream's width, so links of other widths cannot use
        them."""
        width = self._widths(scope)[child.removeprefix("links.")]
        return scope if width == scope.width else replace(scope, width=width, shared={})

    def _widths(self, scope: Scope) -> dict[str, int]:
        """What each link reads."""
        width, widths = scope.width + (scope.stream or scope.width if self.embedding else 0), {}
        for name, node in self.links.items():
            widths[name] = width
            width = node.output_width(replace(scope, width=width))
        return widths

    def output_width(self, scope: Scope) -> int:
        name, last = list(self.links.items())[-1]
        return last.output_width(self.child_scope(f"links.{name}", scope))

    def build(self, scope: Scope) -> "ChainModule":
        return ChainModule(self, scope)

    def flops(self, scope: Scope, length: int) -> float:
        return 0.0

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        normed = [name for name, norm in self.norms.items() if norm.gain != "none"]
        return {f"norms.{name}.weight": (f"{name}_width",) for name in normed}

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        return {"width": scope.width} | {f"{name}_width": width for name, width in self._widths(scope).items()}

    def narrowed(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Narrowing[Self]:
        """Narrows a link's input together with the output of the link before."""
        names, reader = list(self.links), axis.removesuffix("_width")
        if reader == axis or names.index(reader) == 0:
            return super().narrowed(axis, keep, scope)
        writer = names[names.index(reader) - 1]
        inside = {name: self.child_scope(f"links.{name}", scope) for name in (writer, reader)}
        links = {
            writer: self.links[writer].narrow_output(keep, inside[writer]),
            reader: self.links[reader].narrow_input(keep, inside[reader]),
        }
        fields: dict[str, Any] = {"links": {**self.links, **{name: found.spec for name, found in links.items()}}}
        if reader in self.norms:
            norm = self.norms[reader].narrowed(inside[reader].width, keep)
            fields["norms"] = {**self.norms, reader: norm}
        return self.with_fields(fields, axis, keep).with_inside(
            {f"links.{name}": found for name, found in links.items()}
        )


class ChainModule(Node):
    """The module of `Chain`."""

    def __init__(self, spec: Chain, scope: Scope) -> None:
        super().__init__()
        self.spec = spec
        around = {name: spec.child_scope(f"links.{name}", scope) for name in spec.links}
        self.links = nn.ModuleDict({name: node.build(around[name]) for name, node in spec.links.items()})
        self.norms = nn.ModuleDict({name: NormModule(norm, around[name].width) for name, norm in spec.norms.items()})

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        if self.spec.embedding:
            assert context.embedding is not None
            x = torch.cat([x, context.embedding], -1)
        for name, link in self.links.items():
            x = link(self.norms[name](x) if name in self.norms else x, context)
        return x
