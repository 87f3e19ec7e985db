"""Named axes: what each dimension of a parameter runs over, so that parts can be picked without knowing the part."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

Sizes = Mapping[str, int]


def size(dimension: str, sizes: Sizes) -> int:
    """How long a dimension is.

    >>> size("heads*head_dim+state", {"heads": 4, "head_dim": 8, "state": 2})
    34
    """
    return sum(math.prod(sizes[axis] for axis in part.split("*")) for part in dimension.split("+"))


def names(dimensions: Sequence[str]) -> set[str]:
    """Every axis that dimensions name."""
    return {axis for dimension in dimensions for part in dimension.split("+") for axis in part.split("*")}


def narrow(tensor: Tensor, dimensions: Sequence[str], sizes: Sizes, keep: Mapping[str, Int[Tensor, "kept"]]) -> Tensor:
    """The part of a parameter at these indices of some axes, in their order; other axes stay whole."""
    for position, dimension in enumerate(dimensions):
        index = torch.cat([_positions(part, sizes, keep) + start for part, start in _parts(dimension, sizes)])
        tensor = tensor.index_select(position, index.to(tensor.device))
    return tensor


def _parts(dimension: str, sizes: Sizes) -> list[tuple[str, int]]:
    parts, start = [], 0
    for part in dimension.split("+"):
        parts.append((part, start))
        start += size(part, sizes)
    return parts


def _positions(part: str, sizes: Sizes, keep: Mapping[str, Tensor]) -> Int[Tensor, "kept"]:
    """Flat indices of the kept combinations of a product of axes, outermost first."""
    flat = torch.zeros(1, dtype=torch.long)
    for axis in part.split("*"):
        kept = keep.get(axis, torch.arange(sizes[axis]))
        flat = (flat[:, None] * sizes[axis] + kept).flatten()
    return flat
