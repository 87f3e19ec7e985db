"""The shared relative time encoding: one time base, counted from each document's start, added to the input of
every branch that names it. A learned table (also low-rank), or sines and cosines (arXiv 1706.03762, section 3.5).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.components import (
    Count,
    Encoding,
    EncodingSpec,
    Hook,
    Positive,
    Table,
    encodings,
    fan_in,
    normal,
    products,
)

Ids = Int[Tensor, "batch time"]


@dataclass(frozen=True)
class Added(Table):
    """Vectors to add to a branch's input."""

    vectors: Float[Tensor, "batch time width"]

    def input(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        return x + self.vectors.to(x.dtype)


@encodings.register
class SrteLearned(EncodingSpec):
    """A learned vector for each position, added to the input.

    The table has `max_length` vectors, and low rank if `rank` is given.
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input"})
    plain: ClassVar[frozenset[str]] = frozenset({"rank"})
    kind: Literal["srte_learned"] = "srte_learned"
    max_length: Count
    rank: Count | None = None

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Low-rank, and full."""
        yield cls(max_length=256, rank=4)
        yield cls(max_length=64)

    @property
    def limit(self) -> int:
        return self.max_length

    def build(self, width: int, channels: Sequence[int]) -> "SrteLearnedModule":
        return SrteLearnedModule(self, width)

    def flops(self, width: int) -> float:
        return 2.0 * self.rank * width if self.rank else 0.0

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """`table` alone, or `table` and `up`."""
        low_rank = {"table": ("max_length", "rank"), "up": ("width", "rank")}
        return low_rank if self.rank else {"table": ("max_length", "width")}

    def sizes(self, width: int) -> Mapping[str, int]:
        return {"width": width, "max_length": self.max_length} | ({"rank": self.rank} if self.rank else {})


class SrteLearnedModule(Encoding):
    """A table of vectors, times `up` where it is low-rank."""

    def __init__(self, spec: SrteLearned, width: int) -> None:
        super().__init__()
        columns = spec.rank or width
        self.table = self.declare("table", (spec.max_length, columns), normal(0.02 if spec.rank is None else 1.0))
        self.up = None if spec.rank is None else self.declare("up", (width, columns), fan_in(0.02))

    def forward(self, positions: Ids) -> Added:
        vectors = F.embedding(positions, self.table)
        return Added(vectors if self.up is None else products.linear(vectors, self.up))


@encodings.register
class SrteSincos(EncodingSpec):
    """Sines and cosines of the position, added to the input.

    Wavelengths run from 2 pi to 2 pi `theta`; there are no parameters.
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input"})
    kind: Literal["srte_sincos"] = "srte_sincos"
    theta: Positive = 10000.0
    multiplier: Positive = 1.0

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        yield cls()

    def build(self, width: int, channels: Sequence[int]) -> "SrteSincosModule":
        return SrteSincosModule(self, width)


class SrteSincosModule(Encoding):
    """Sines in the first half of the width, cosines in the second (an odd width loses the last cosine)."""

    def __init__(self, spec: SrteSincos, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width

    def forward(self, positions: Ids) -> Added:
        """Evaluate at the positions, in float64 so that far positions stay exact."""
        half = (self.width + 1) // 2
        exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
        angles = positions[..., None] * self.spec.theta**-exponents
        return Added(self.spec.multiplier * torch.cat([angles.sin(), angles.cos()], -1)[..., : self.width])
