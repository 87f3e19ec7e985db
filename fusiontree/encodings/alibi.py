"""ALiBi: attention whose scores fall linearly with the distance, by a slope a head (arXiv 2108.12409)."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Self

from jaxtyping import Int
from torch import Tensor

from fusiontree.components import Encoding, EncodingSpec, Hook, Table, encodings


@encodings.register
class Alibi(EncodingSpec):
    """Scores of attention less slope * distance in tokens. Slopes follow from the number of a branch's heads; windowed
    heads have the first ones, global heads the last."""

    hooks: ClassVar[frozenset[Hook]] = frozenset({"bias"})
    kind: Literal["alibi"] = "alibi"

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        yield cls()

    def build(self, width: int, channels: Sequence[int]) -> "AlibiModule":
        return AlibiModule()


class AlibiModule(Encoding):
    """Holds no parameters."""

    def forward(self, positions: Int[Tensor, "batch time"]) -> "Slopes":
        """The same at all positions: only the distance matters."""
        return Slopes()


class Slopes(Table):
    """The slopes of the paper."""

    def slopes(self, heads: int) -> tuple[float, ...]:
        """See `paper_slopes`."""
        return paper_slopes(heads)


def paper_slopes(heads: int) -> tuple[float, ...]:
    """A geometric series down to 2^-8. For a number of heads that is no power of two: the slopes of the power below,
    then every second slope of the power above (section 3 of the paper, and its code).

    >>> paper_slopes(2), paper_slopes(3)
    ((0.0625, 0.00390625), (0.0625, 0.00390625, 0.25))
    """
    below = 1 << heads.bit_length() - 1
    first = [2 ** (-8 * (head + 1) / below) for head in range(below)]
    rest = [2 ** (-4 * (2 * head + 1) / below) for head in range(heads - below)]
    return (*first, *rest)
