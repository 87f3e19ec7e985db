"""Named axes of the dimensions of parameters. With them, parts can be selected or removed without knowledge of the
parameter's purpose."""

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from fusiontree.core.spec.base import Spec
from fusiontree.errors import SpecError, suggest

Sizes = Mapping[str, int]
Kept = Mapping[str, tuple[int, ...]]
"""The kept indices of each axis, in rising order; an axis that is absent stays whole."""
SpecT = TypeVar("SpecT", bound=Spec, covariant=True)


@dataclass(frozen=True)
class Narrowing(Generic[SpecT]):
    """A narrowed spec, and which indices of its parameters' axes are kept.

    Attributes:
        spec: the narrowed spec.
        kept: kept indices of the axes, by the path of the node (or encoding) that has the parameters. Paths start
            at this spec; "" is the spec itself.
    """

    spec: SpecT
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def with_inside(self, inside: "Mapping[str, Narrowing[Any]]") -> "Narrowing[SpecT]":
        """Adds what is kept inside child nodes, by path; `spec` must hold their narrowed specs already."""
        kept = {
            f"{path}.{below}" if below else path: axes
            for path, found in inside.items()
            for below, axes in found.kept.items()
        }
        return Narrowing(self.spec, {**self.kept, **kept})


def size(dimension: str, sizes: Sizes) -> int:
    """The length of a dimension.

    >>> size("heads*head_dim+state", {"heads": 4, "head_dim": 8, "state": 2})
    34
    """
    return sum(math.prod(sizes[axis] for axis in part.split("*")) for part in dimension.split("+"))


def names(dimensions: Sequence[str]) -> set[str]:
    """Every axis that dimensions name."""
    return {axis for dimension in dimensions for part in dimension.split("+") for axis in part.split("*")}


def narrow(tensor: Tensor, dimensions: Sequence[str], sizes: Sizes, keep: Mapping[str, Sequence[int]]) -> Tensor:
    """Select the indices `keep` along the axes of a parameter, in the given order; other axes stay whole."""
    for place, dimension in enumerate(dimensions):
        tensor = tensor.index_select(place, positions(dimension, sizes, keep).to(tensor.device))
    return tensor


def positions(dimension: str, sizes: Sizes, keep: Mapping[str, Sequence[int]]) -> Int[Tensor, "kept"]:
    """The positions along a dimension whose index on every axis is kept.

    >>> positions("heads*head_dim+state", {"heads": 2, "head_dim": 3, "state": 2}, {"heads": [1]}).tolist()
    [3, 4, 5, 6, 7]
    """
    return torch.cat([_within(part, sizes, keep) + start for part, start in _parts(dimension, sizes)])


def kept_along(dimension: str, sizes: Sizes, indices: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The inverse of `positions`: the kept indices of each axis, without the axes that stay whole.

    >>> kept_along("heads*head_dim", {"heads": 2, "head_dim": 3}, [3, 5])
    {'heads': (1,), 'head_dim': (0, 2)}

    Raises:
        SpecError: no choice of at least one index per axis keeps exactly these positions.
    """
    found: dict[str, set[int]] = {axis: set() for axis in _ordered(dimension)}
    for part, start in _parts(dimension, sizes):
        axes = part.split("*")
        inside = torch.tensor([p - start for p in indices if 0 <= p - start < size(part, sizes)], dtype=torch.long)
        for axis, index in zip(axes, torch.unravel_index(inside, [sizes[axis] for axis in axes]), strict=True):
            found[axis] |= set(index.tolist())
    kept = {axis: tuple(sorted(index)) for axis, index in found.items()}
    for axis, index in kept.items():
        if not index and sizes[axis]:
            raise SpecError(f"{axis}: none would be left")
    if positions(dimension, sizes, kept).tolist() != list(indices):
        raise SpecError(f"these channels are no whole parts of {dimension.replace('*', ' x ').replace('+', ' and ')}")
    return {axis: index for axis, index in kept.items() if len(index) < sizes[axis]}


def checked(axis: str, keep: Sequence[int], sizes: Sizes) -> tuple[int, ...]:
    """Check the kept indices of an axis and return them as a tuple.

    Raises:
        SpecError: there is no such axis; or the indices are no integers, out of range, not rising, or empty.
    """
    if axis not in sizes:
        raise SpecError(f"{axis}: no such axis{suggest(axis, sizes)}")
    found = _integers(keep)
    rising = sorted(set(found))
    if not rising or found != rising or rising[0] < 0 or rising[-1] >= sizes[axis]:
        wanted = f"rising indices in 0..{sizes[axis] - 1}, one at least"
        raise SpecError(f"{axis}: expected {wanted}, found {keep!r:.80}")
    return tuple(rising)


def _integers(keep: Any) -> list[int]:
    """The indices as a list of `int`, from any integer type; an empty list if one is no integer, as in a mask."""
    if not isinstance(keep, Collection) or any(isinstance(i, bool) for i in keep):
        return []
    try:
        return [operator.index(i) for i in keep]
    except TypeError:
        return []


def _ordered(dimension: str) -> list[str]:
    return list(dict.fromkeys(axis for part in dimension.split("+") for axis in part.split("*")))


def _parts(dimension: str, sizes: Sizes) -> list[tuple[str, int]]:
    parts, start = [], 0
    for part in dimension.split("+"):
        parts.append((part, start))
        start += size(part, sizes)
    return parts


def _within(part: str, sizes: Sizes, keep: Mapping[str, Sequence[int]]) -> Int[Tensor, "kept"]:
    """Flat indices of the kept combinations of a product of axes, outermost first."""
    flat = torch.zeros(1, dtype=torch.long)
    for axis in part.split("*"):
        kept = torch.as_tensor(keep.get(axis, range(sizes[axis])), dtype=torch.long)
        flat = (flat[:, None] * sizes[axis] + kept).flatten()
    return flat
