"""Branches whose sum joins the input of another node, and not the stream (Zamba, arXiv 2405.16712)."""

from collections.abc import Iterator, Mapping
from typing import Literal, Self

from fusiontree.components import AnyNode, Context, NodeSpec, Norm, NormModule, Problems, Scope, Weights, fusions, total
from fusiontree.fusions.base import BaseFusion, BaseFusionSpec, Fused, Stream, example_branches
from fusiontree.fusions.parts import Features


@fusions.register
class Inject(BaseFusionSpec):
    """Adds the branches to the input of another node.

    into(norm(x + sum_i h_i)), the sum behind the projection where there is one.

    Attributes:
        into: the node that reads the sum.
        norm: of the sum.
    """

    kind: Literal["inject"] = "inject"
    into: AnyNode
    norm: Norm | None = None

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Two branches into a feed-forward network."""
        yield cls.model_validate(
            {"branches": example_branches(width), "into": {"kind": "mlp", "hidden": 8}, "norm": {}, "projection": {}}
        )

    def children(self) -> Iterator[tuple[str, NodeSpec]]:
        yield from super().children()
        yield "into", self.into

    def problems(self, scope: Scope) -> Problems:
        """As of every fusion; the node has to return the stream's width."""
        yield from super().problems(scope)
        if self.into.output_width(scope) != scope.width:
            yield "into", f"expected the width {scope.width} of what it returns, found {self.into.output_width(scope)}"

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        own = {"norm.weight": ("width",)} if self.norm and self.norm.gain != "none" else {}
        return {**super().axes(), **own}

    def is_identity(self, branch: str) -> bool:
        """The branch is not what is returned."""
        return False

    def build(self, scope: Scope) -> "InjectModule":
        return InjectModule(self, scope)


class InjectModule(BaseFusion):
    """The module of `Inject`."""

    def __init__(self, spec: Inject, scope: Scope) -> None:
        super().__init__(spec, scope)
        self.into = spec.into.build(scope)
        self.norm = NormModule(spec.norm, scope.width) if spec.norm else None

    def fuse(self, features: Features, weights: Weights) -> Fused:
        return total(features.values())

    def forward(self, x: Stream, context: Context) -> Stream:
        x = x + super().forward(x, context)
        return self.into(x if self.norm is None else self.norm(x), context)
