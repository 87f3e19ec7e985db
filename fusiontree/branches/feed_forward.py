"""The base of feed-forward branches: W_down act(W_up x), with a gate W_gate x in some kinds."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar, Self

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from fusiontree.components import (
    BranchSpec,
    Context,
    Count,
    Flag,
    LinearModule,
    Node,
    Real,
    Scope,
    Spec,
    invalid,
    scaled,
)

Stream = Float[Tensor, "batch time width"]
Activation = Callable[[Tensor], Tensor]


def _relu2(x: Tensor) -> Tensor:
    """The square of what is positive (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": _relu2,
}


class FeedForwardMultipliers(Spec):
    """Constants times what the gate's map and the map out give (muP; Falcon-H1, arXiv 2507.22448)."""

    gate: Real = 1.0
    down: Real = 1.0


class FeedForwardSpec(BranchSpec):
    """The fields of every feed-forward kind. `bias` is that of all its maps."""

    plain: ClassVar[frozenset[str]] = frozenset({"hidden"})
    hidden: Count
    bias: Flag = False
    multipliers: FeedForwardMultipliers = FeedForwardMultipliers()

    @model_validator(mode="after")
    def _gate_exists(self) -> Self:
        if self.multipliers.gate != 1.0 and not self.gated:
            raise invalid({("multipliers", "gate"): f"{self.activation_name} has no gate"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Twice as wide inside, with biases."""
        yield cls(hidden=2 * width, bias=True)

    @property
    def activation_name(self) -> str:
        """A key of ACTIVATIONS."""
        raise NotImplementedError

    @property
    def gated(self) -> bool:
        """Whether a second map gates the first."""
        raise NotImplementedError

    def build(self, scope: Scope) -> "FeedForwardModule":
        return FeedForwardModule(self, scope.width)

    def maps(self) -> tuple[str, ...]:
        """The maps into the hidden features."""
        return ("gate", "up") if self.gated else ("up",)

    def flops(self, scope: Scope, length: int) -> float:
        return 2.0 * (len(self.maps()) + 1) * scope.width * self.hidden

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        axes: dict[str, tuple[str, ...]] = {f"{name}.weight": ("hidden", "width") for name in self.maps()}
        axes["down.weight"] = ("width", "hidden")
        if self.bias:
            axes |= {f"{name}.bias": ("hidden",) for name in self.maps()} | {"down.bias": ("width",)}
        return axes

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        return {"width": scope.width, "hidden": self.hidden}


class FeedForwardModule(Node):
    """The module of a feed-forward spec."""

    def __init__(self, spec: FeedForwardSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.activation = ACTIVATIONS[spec.activation_name]
        self.gate = LinearModule(width, spec.hidden, bias=spec.bias) if spec.gated else None
        self.up = LinearModule(width, spec.hidden, bias=spec.bias)
        self.down = LinearModule(spec.hidden, width, bias=spec.bias)

    def forward(self, x: Stream, context: Context) -> Stream:
        x = context.encode(self.spec.encodings, x)
        up = self.up(x)
        if self.gate is None:
            hidden = self.activation(up)
        else:
            hidden = self.activation(scaled(self.gate(x), self.spec.multipliers.gate)) * up
        return scaled(self.down(hidden), self.spec.multipliers.down)
