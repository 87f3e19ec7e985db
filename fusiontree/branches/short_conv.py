"""Gated short convolution (LFM2, arXiv 2511.23404): a few tokens of memory, and no recurrence.

The output is W_out (C * conv(B * x)), with B, C and x linear in the input and a short causal convolution a channel.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.branches.projected import ProjectedModule, ProjectedSpec
from fusiontree.branches.recurrent import Convolution, kept
from fusiontree.components import Context, Count, Flag, LinearModule, Scope, State, branches

Stream = Float[Tensor, "batch time width"]


@branches.register
class ShortConv(ProjectedSpec):
    """A convolution over the last `conv` tokens, gated on both sides.

    `inner` channels inside. `bias` is that of the maps to B, C and x. `project: false` returns the channels, for a
    fusion with a projection.
    """

    rigid: ClassVar[frozenset[str]] = frozenset({"width", "conv"})
    plain: ClassVar[frozenset[str]] = frozenset({"inner"})
    inner_axes: ClassVar[str] = "inner"
    kind: Literal["short_conv"] = "short_conv"
    inner: Count
    conv: Count = 3
    conv_bias: Flag = False
    bias: Flag = False
    out_bias: Flag = False
    project: Flag = True

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Wider inside, with all biases."""
        yield cls(inner=3 * width // 2, conv_bias=True, bias=True, out_bias=True)

    def build(self, scope: Scope) -> "ShortConvModule":
        return ShortConvModule(self, scope.width)

    def flops(self, scope: Scope, length: int) -> float:
        maps = 4 if self.project else 3
        return 2.0 * self.inner * (maps * scope.width + self.conv)

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """The convolution's last inputs."""
        return (self.conv - 1) * self.inner * dtype.itemsize

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        axes: dict[str, tuple[str, ...]] = {f"{name}.weight": ("inner", "width") for name in ("B", "C", "x")}
        axes |= {f"{name}.bias": ("inner",) for name in ("B", "C", "x")} if self.bias else {}
        axes |= {"conv.weight": ("inner", "conv")}
        axes |= {"conv.bias": ("inner",)} if self.conv_bias else {}
        return axes | self.output_axes()

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        return {"width": scope.width, "inner": self.inner, "conv": self.conv}


class ShortConvModule(ProjectedModule):
    """The module of `ShortConv`: B, C and x are separate parameters."""

    def __init__(self, spec: ShortConv, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.B, self.C, self.x = (LinearModule(width, spec.inner, bias=spec.bias) for _ in range(3))
        self.conv = Convolution(spec.inner, spec.conv, bias=spec.conv_bias)
        self.add_output_map(spec, width)

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        state = self.state(context)
        x = context.encode(self.spec.encodings, x)
        y = self.C(x) * self.conv(self.B(x) * self.x(x), context, kept(state, "conv"))
        return self.projected(y)

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """The last inputs of the convolution, oldest first."""
        return {"conv": like.new_zeros(batch, self.spec.conv - 1, self.spec.inner)}
