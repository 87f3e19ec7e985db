"""Formats of files of weights, and reading older ones.

2: as the model names its parameters.
1: attention with windowed and global heads had one map for both; it had no number.
"""

from collections.abc import Iterator, Mapping
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
    """A model's tensors by the names that they have now.

    Args:
        tensors: as a file has them.
        shapes: those that the spec's model has.
        number: the file's format.

    Raises:
        WeightsError: there is no such format.
    """
    if number not in ("1", WEIGHTS):
        raise WeightsError(f"format: expected 1 or {WEIGHTS}, found {number:.20}; a newer FusionTree wrote it")
    found = dict(tensors)
    for old, names in _packed(spec) if number == "1" else ():
        rows = [shapes[name][0] for name in names]
        if old in found and found[old].shape[:1] == (sum(rows),):
            parts = found.pop(old).split(rows)
            found |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return found


def _packed(spec: ModelSpec) -> Iterator[tuple[str, list[str]]]:
    """Names that format 1 had, each with those that stand for it now."""
    for path, node in spec.nodes():
        yield from ((f"{path}.{old}", [f"{path}.{name}" for name in names]) for old, names in node.packed().items())
