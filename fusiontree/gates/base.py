"""What gates have in common: where their logits come from, at every granularity."""

from collections.abc import Iterator, Mapping
from typing import Literal, Self

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from fusiontree.components import (
    Count,
    Flag,
    GateScope,
    GateSpec,
    Module,
    Problems,
    constant,
    fan_in,
    invalid,
    products,
)

Features = Float[Tensor, "batch time features"]


class LearnedGateSpec(GateSpec):
    """A gate whose values are learned.

    `granularity`: one value (layer), one a position (token), one for each of `heads` equal groups of the width
    (head), one a channel (channel). Head and channel gates depend on the input unless `static`; then a low
    `rank` may be given. Output weights and biases start at 0, so that branches start equal.
    """

    granularity: Literal["layer", "token", "head", "channel"] = "channel"
    heads: Count | None = None
    rank: Count | None = None
    static: Flag = False

    @model_validator(mode="after")
    def _options_agree(self) -> "LearnedGateSpec":
        here = f"granularity is {self.granularity!r}"
        if (self.granularity == "head") != (self.heads is not None):
            text = "the number of groups is missing" if self.heads is None else f"found {self.heads}; leave it out"
            raise invalid({("heads",): f"{here}, and only 'head' has groups: {text}"})
        if self.static and self.granularity in ("layer", "token"):
            raise invalid({("static",): f"{here}, only 'head' and 'channel' may be static; leave it out"})
        if self.rank is not None and (self.static or self.granularity not in ("head", "channel")):
            text = f"{here}{' and static' if self.static else ''}; found {self.rank}, leave it out or set it to null"
            raise invalid({("rank",): f"only for 'head' and 'channel' gates that read their input: {text}"})
        return self

    @classmethod
    def examples(cls, branches: tuple[str, ...], width: int) -> Iterator[Self]:
        """Every granularity."""
        yield cls(granularity="channel", rank=4)
        yield from (cls(granularity=granularity) for granularity in ("layer", "token", "channel"))
        yield from (cls(granularity="head", heads=4, static=static) for static in (False, True))
        yield cls(granularity="channel", static=True)

    @property
    def reads_features(self) -> bool:
        return not (self.static or self.granularity == "layer")

    def units(self, width: int) -> int:
        return {"layer": 1, "token": 1, "head": self.heads or 1, "channel": width}[self.granularity]

    def problems(self, scope: GateScope) -> Problems:
        """Groups that do not divide the width, ranks that save nothing."""
        if self.heads is not None and scope.width % self.heads:
            yield "heads", f"{self.heads} groups do not divide the width {scope.width}"

    def logit_flops(self, scope: GateScope) -> float:
        """Forward FLOPs per token of one logit for each unit."""
        units, rank = self.units(scope.width), self.rank
        if not self.reads_features:
            return 0.0
        return 2.0 * scope.features * units if rank is None else 2.0 * rank * (scope.features + units)

    def logit_axes(self, prefix: str = "") -> Mapping[str, tuple[str, ...]]:
        """The axes of one `Logit`."""
        axes: dict[str, tuple[str, ...]] = {f"{prefix}bias": ("units",)}
        if self.reads_features:
            axes[f"{prefix}weight"] = ("units", "features" if self.rank is None else "rank")
        if self.rank is not None:
            axes[f"{prefix}down"] = ("rank", "features")
        return axes

    def sizes(self, scope: GateScope) -> Mapping[str, int]:
        return {**super().sizes(scope), **({"rank": self.rank} if self.rank else {})}

    def narrow(self, axis: str, keep: tuple[int, ...], scope: GateScope) -> Self:
        """A lower rank."""
        return self.model_copy(update={axis: len(keep)}) if axis == "rank" else super().narrow(axis, keep, scope)

    def with_units(self, units: int) -> Self:
        """As many groups; channels need no number."""
        return self if self.heads is None else self.model_copy(update={"heads": units})


class Logit(Module):
    """One logit for each unit: weight (down features) + bias, or the bias alone."""

    def __init__(self, spec: LearnedGateSpec, scope: GateScope) -> None:
        super().__init__()
        units, inputs = spec.units(scope.width), spec.rank or scope.features
        self.bias = self.declare("bias", (units,), constant(0.0))
        reads = spec.reads_features
        self.weight = self.declare("weight", (units, inputs), constant(0.0), decay=True) if reads else None
        self.down = self.declare("down", (inputs, scope.features), fan_in(), decay=True) if spec.rank else None

    def forward(self, features: Features) -> Float[Tensor, "batch time units"] | Float[Tensor, "units"]:
        """The logits at every position, or for all positions at once."""
        if self.weight is None:
            return self.bias
        inputs = features if self.down is None else products.linear(features, self.down)
        return products.linear(inputs, self.weight, self.bias)
