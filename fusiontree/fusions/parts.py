"""The optional parts of a fusion: messages between branches, common features, and the way back to the stream.

Every parameter belongs to one branch or to none, so that a branch leaves by leaving out its paths.
"""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fusiontree.components import Count, Flag, LinearModule, Module, Spec, constant, total

Features = dict[str, Float[Tensor, "batch time features"]]


class ExchangeSpec(Spec):
    """Light messages between branches: h_i + up_i (sum over the other branches j of down_j h_j), of low `rank`;
    `up` starts at 0."""

    rank: Count

    def flops(self, widths: Mapping[str, int]) -> float:
        """Forward FLOPs per token."""
        return 4.0 * self.rank * sum(widths.values())


class Exchange(Module):
    """The module of an `ExchangeSpec`."""

    def __init__(self, spec: ExchangeSpec, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.down = nn.ModuleDict({name: LinearModule(width, spec.rank) for name, width in widths.items()})
        self.up = nn.ModuleDict({n: LinearModule(spec.rank, w, init=constant(0.0)) for n, w in widths.items()})

    def forward(self, features: Features) -> Features:
        """Every branch's features with the others' messages added."""
        messages = {name: self.down[name](h) for name, h in features.items()}
        others = {name: total(m for n, m in messages.items() if n != name) for name in features}
        return {name: h + self.up[name](others[name]) for name, h in features.items()}


class AlignSpec(Spec):
    """Common features, of the stream's width, from all branches: W gelu(sum over branches of W_i h_i + b)."""

    kind: Literal["mlp"] = "mlp"
    hidden: Count

    def flops(self, widths: Mapping[str, int], width: int) -> float:
        """Forward FLOPs per token."""
        return 2.0 * self.hidden * (sum(widths.values()) + width)


class Align(Module):
    """The module of an `AlignSpec`."""

    def __init__(self, spec: AlignSpec, widths: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict({name: LinearModule(w, spec.hidden) for name, w in widths.items()})
        self.bias = self.declare("bias", (spec.hidden,), constant(0.0))
        self.out = LinearModule(spec.hidden, width)

    def forward(self, features: Features) -> Float[Tensor, "batch time width"]:
        """The common features."""
        return self.out(F.gelu(total(self.inputs[name](h) for name, h in features.items()) + self.bias))


class ProjectionSpec(Spec):
    """A linear map from the fused features back to the stream."""

    bias: Flag = False
