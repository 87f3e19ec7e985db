"""The branches side by side under one projection, each with its own columns: W [h_1; h_2] = W_1 h_1 + W_2 h_2."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import model_validator
from torch import nn

from fusiontree.components import LinearModule, Module, Scope, Weights, constant, fusions, invalid, normal, total
from fusiontree.fusions.base import BaseFusion, BaseFusionSpec, Stream, example_branches
from fusiontree.fusions.parts import Features


@fusions.register
class Concat(BaseFusionSpec):
    """The branches side by side under one projection; their widths may differ."""

    kind: Literal["concat"] = "concat"
    equal_widths: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_projection(self) -> Self:
        if self.projection is None:
            raise invalid({("projection",): "features side by side need a projection to the stream's width"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Two branches and a bias."""
        yield cls.model_validate({"branches": example_branches(width), "projection": {"bias": True}})

    def projection_inputs(self, scope: Scope) -> int:
        """All the branches' features."""
        return sum(self.widths(scope).values())

    def build(self, scope: Scope) -> "ConcatModule":
        return ConcatModule(self, scope)

    def projection_axes(self) -> dict[str, tuple[str, ...]]:
        axes = {f"projection.inputs.{name}.weight": ("width", f"{name}.width") for name in self.branches}
        return axes | ({"projection.bias": ("width",)} if self.projection and self.projection.bias else {})


class ConcatModule(BaseFusion):
    """The module of `Concat`."""

    def build_projection(self, spec: BaseFusionSpec, scope: Scope) -> "Projection":
        """Columns for each branch."""
        assert spec.projection is not None
        return Projection(spec.widths(scope), scope.width, bias=spec.projection.bias)

    def combine(self, features: Features, weights: Weights) -> Stream:
        """Every branch through its columns."""
        assert self.projection is not None
        return self.projection(features)


class Projection(Module):
    """A linear map of features that stand side by side."""

    def __init__(self, widths: dict[str, int], width: int, *, bias: bool) -> None:
        super().__init__()
        init = normal(sum(widths.values()) ** -0.5)
        self.inputs = nn.ModuleDict({name: LinearModule(w, width, init=init) for name, w in widths.items()})
        self.bias = self.declare("bias", (width,), constant(0.0)) if bias else None

    def forward(self, features: Features) -> Stream:
        """The sum over the branches of W_i h_i."""
        projected = total(self.inputs[name](h) for name, h in features.items())
        return projected if self.bias is None else projected + self.bias
