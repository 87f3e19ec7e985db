"""Rotary position embedding (RoFormer, arXiv 2104.09864): channels i and i + dim/2 turn by position * theta^(-2i/dim).

Named by attention and by Mamba-2 it is one rotary time base for both: queries and keys, C and B.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from fusiontree.components import (
    Encoding,
    EncodingSpec,
    Hook,
    Positive,
    Table,
    accumulation_dtype,
    encodings,
    invalid,
    scaled,
)
from fusiontree.encodings.rope_scaling import AnyScaling
from fusiontree.kernels.common.constants import constants

Ids = Int[Tensor, "batch time"]
Heads = Float[Tensor, "batch time heads channels"]
Turns = tuple[Tensor, Tensor]
"""The factors of each channel and of the channel half a head away: cosines, and sines whose first half is negative
[batch, time, 1, channels]."""


@encodings.register
class Rope(EncodingSpec):
    """A rotation of queries and keys, or of C and B, by position.

    `dim`: the number of rotated channels, the first ones; null: all. `scaling` slows rotations down, for sequences
    longer than those in training.
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset({"rotate"})
    kind: Literal["rope"] = "rope"
    theta: Positive = 10000.0
    dim: Annotated[int, Field(strict=True, ge=2, multiple_of=2)] | None = None
    scaling: AnyScaling | None = None

    @model_validator(mode="after")
    def _frequencies_fall(self) -> Self:
        if self.scaling and self.theta <= 1:
            raise invalid({("theta",): f"expected a number above 1 where there is scaling, found {self.theta}"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """All channels, some, and each kind of scaling."""
        yield cls()
        yield cls(theta=100.0, dim=2)
        for kind in ("yarn", "llama3"):
            yield cls.model_validate({"theta": 50.0, "scaling": {"kind": kind, "factor": 2.0, "original_length": 8}})

    def build(self, width: int, channels: Sequence[int]) -> "RopeModule":
        return RopeModule(self, channels)

    def frequencies(self, dim: int, device: torch.device | None = None) -> Float[Tensor, "pairs"]:
        """Radians a position, in float64, where `dim` channels turn."""
        frequencies = self.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        return frequencies if self.scaling is None else self.scaling.scaled(frequencies, self.theta)

    def problems(self, channels: Iterator[int]) -> Iterator[str]:
        """Odd channel counts, and fewer channels than turn."""
        for count in channels:
            if self.dim is not None and self.dim > count:
                yield f"rotates {self.dim} channels, the branch has {count}"
            if self.dim is None and count % 2:
                yield f"rotates pairs of channels, the branch has {count}"


class RopeModule(Encoding):
    """Holds no parameters."""

    def __init__(self, spec: Rope, channels: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        dims, cpu = sorted({spec.dim or count for count in channels}), torch.device("cpu")
        self.frequencies = {dim: tuple(spec.frequencies(dim, cpu).tolist()) for dim in dims}

    def forward(self, positions: Ids) -> "Rotation":
        return Rotation(self.spec.dim, {dim: self._turns(dim, positions) for dim in self.frequencies})

    def _turns(self, dim: int, positions: Ids) -> dict[torch.dtype, Turns]:
        """From float64 angles so that far positions stay exact."""
        angles = positions[..., None, None] * constants(self.frequencies[dim], torch.float64, positions.device)
        magnitude = self.spec.scaling.magnitude if self.spec.scaling else 1.0
        cos, sin = scaled(angles.cos(), magnitude), scaled(angles.sin(), magnitude)
        turns = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return {torch.float64: turns, torch.float32: (turns[0].float(), turns[1].float())}


class Rotation(Table):
    """Turns for each number of channels that turn, and each type to compute in: those of all layers are made once."""

    def __init__(self, dim: int | None, turns: Mapping[int, Mapping[torch.dtype, Turns]]) -> None:
        self.dim, self.turns = dim, turns

    def rotate(self, x: Heads) -> Heads:
        """Turn the first `dim` channels, in float32 or better."""
        dim = self.dim or x.shape[-1]
        turning = x if dim == x.shape[-1] else x[..., :dim]
        precise = turning.to(accumulation_dtype(x.dtype))
        cos, sin = self.turns[dim][precise.dtype]
        turned = torch.addcmul(precise * cos, precise.roll(dim // 2, -1), sin).to(x.dtype)
        return turned if turning is x else torch.cat([turned, x[..., dim:]], -1)
