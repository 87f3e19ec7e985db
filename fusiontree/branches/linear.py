"""A linear map alone: a link between nodes of different widths."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self

from jaxtyping import Float
from torch import Tensor

from fusiontree.components import BranchSpec, Context, Count, Flag, LinearModule, Narrowing, Node, Scope, branches

Stream = Float[Tensor, "batch time width"]


@branches.register
class Linear(BranchSpec):
    """W x + b.

    Attributes:
        outputs: features that it returns; null: as many as it reads.
        bias: whether there is a b.
    """

    kind: Literal["linear"] = "linear"
    outputs: Count | None = None
    bias: Flag = False

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        yield cls(bias=True)

    def output_width(self, scope: Scope) -> int:
        return self.outputs or scope.width

    def build(self, scope: Scope) -> "LinearNode":
        return LinearNode(self, scope)

    def flops(self, scope: Scope, length: int) -> float:
        return 2.0 * scope.width * self.output_width(scope)

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        return {"map.weight": ("output_width", "width")} | ({"map.bias": ("output_width",)} if self.bias else {})

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        return {"width": scope.width, "output_width": self.output_width(scope)}

    def narrow_output(self, channels: Sequence[int], scope: Scope) -> Narrowing[Self]:
        return self.with_fields({"outputs": len(channels)}, "output_width", tuple(channels))

    def narrow_input(self, channels: Sequence[int], scope: Scope) -> Narrowing[Self]:
        return self.with_fields({"outputs": self.output_width(scope)}, "width", tuple(channels))


class LinearNode(Node):
    """The module of `Linear`."""

    def __init__(self, spec: Linear, scope: Scope) -> None:
        super().__init__()
        self.spec = spec
        self.map = LinearModule(scope.width, spec.output_width(scope), bias=spec.bias)

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time outputs"]:
        return self.map(context.encode(self.spec.encodings, x))
