"""What an encoding promises: a time base that branches share by naming it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from jaxtyping import Int
from torch import Tensor

from fusiontree.core.contracts import axes
from fusiontree.core.contracts.axes import Narrowing
from fusiontree.core.contracts.context import Table
from fusiontree.core.contracts.examples import by_older_name
from fusiontree.core.contracts.modules import Module
from fusiontree.core.spec.base import Spec
from fusiontree.core.spec.registry import Registry
from fusiontree.errors import SpecError

Hook = Literal["input", "rotate", "bias"]


class EncodingSpec(Spec, ABC):
    """A time base that branches share by naming it."""

    hooks: ClassVar[frozenset[Hook]]
    plain: ClassVar[frozenset[str]] = frozenset()
    """Axes as in `NodeSpec.plain`."""

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """See `NodeSpec.examples`."""
        yield from by_older_name(cls, width)

    @property
    def limit(self) -> int | None:
        """How many positions the encoding has; None: any number."""
        return None

    @abstractmethod
    def build(self, width: int, channels: Sequence[int]) -> "Encoding":
        """The module; `channels` are the numbers of channels that it rotates in its branches."""

    def problems(self, channels: Iterator[int]) -> Iterator[str]:
        """Why this encoding does not fit a branch that rotates these channels."""
        yield from ()

    def flops(self, width: int) -> float:
        """Forward FLOPs per token to compute the table."""
        return 0.0

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """See `NodeSpec.axes`."""
        return {}

    def sizes(self, width: int) -> Mapping[str, int]:
        """See `NodeSpec.sizes`."""
        return {"width": width}

    def narrow(self, axis: str, keep: Sequence[int], width: int) -> Narrowing[Self]:
        """See `NodeSpec.narrow`.

        Raises:
            SpecError: no such axis or indices, or no narrower encoding computes the same values.
        """
        sizes = self.sizes(width)
        kept = axes.checked(axis, keep, sizes)
        if len(kept) == sizes[axis]:
            return Narrowing(self)
        if axis not in self.plain:
            raise SpecError(f"{axis}: cannot be narrowed here")
        return Narrowing(self.model_copy(update={axis: len(kept)}), {"": {axis: kept}})


class Encoding(Module, ABC):
    """The module of an encoding."""

    @abstractmethod
    def forward(self, positions: Int[Tensor, "batch time"]) -> Table:
        """Evaluate the encoding, once for each forward pass of the model."""
        raise NotImplementedError


encodings: Registry[EncodingSpec] = Registry("encoding", EncodingSpec, home="fusiontree.encodings")

AnyEncoding = Annotated[EncodingSpec, encodings]
"""A field that holds any encoding."""
