"""Formats of weight files, and the migration of older ones.

2: names are those of the model's parameters.
1: attention had one map for windowed and global heads; the file holds no number.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import WeightsError

WEIGHTS = "2"
"""The number that is written."""
Shape = tuple[int, ...]
Value = TypeVar("Value")


def migrated(
    spec: ModelSpec, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], number: str
) -> dict[str, Tensor]:
    """A model's tensors under today's names.

    Args:
        tensors: as a file has them.
        shapes: those that the spec's model has.
        number: the file's format.

    Raises:
        WeightsError: there is no such format, or a tensor of format 1 stands beside its parts or has another shape.
    """
    if number not in ("1", WEIGHTS):
        newer = "; a newer FusionTree wrote it" if number.isdecimal() and int(number) > int(WEIGHTS) else ""
        raise WeightsError(f"the number of the weights' format: expected 1 or {WEIGHTS}, found {number!r:.20}{newer}")
    found = dict(tensors)
    for old, names in _packed(spec) if number == "1" else ():
        if old in tensors:
            wanted = [shapes[name] for name in names]
            _check_packed(old, tensors[old], names, wanted, tensors)
            parts = found.pop(old).split([rows for rows, *_ in wanted])
            found |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return found


def _check_packed(
    old: str, tensor: Tensor, names: Sequence[str], wanted: Sequence[Shape], tensors: Mapping[str, Tensor]
) -> None:
    if twice := [name for name in names if name in tensors]:
        raise WeightsError(f"tensor {old!r} of format 1 and {twice[0]!r}, which stands for it now, are both there")
    whole = (sum(rows for rows, *_ in wanted), *wanted[0][1:])
    if tensor.shape != whole:
        raise WeightsError(f"tensor {old!r} has the shape {tuple(tensor.shape)}, the spec says {whole}")


def _packed(spec: ModelSpec) -> Iterator[tuple[str, list[str]]]:
    """Yields each name of format 1 with the names that replaced it."""
    for path, node in spec.nodes():
        yield from ((f"{path}.{old}", [f"{path}.{name}" for name in names]) for old, names in node.packed().items())
