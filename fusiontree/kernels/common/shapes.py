"""Checks arguments of operators against the shapes in their annotations: a mismatch is a one-line error, never a read
of foreign memory."""

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_type_hints

from jaxtyping import Int
from torch import Tensor

from fusiontree.errors import FusionTreeError

_integers: Any = Int
INTEGERS = _integers.dtypes


class _Field(NamedTuple):
    """A tensor among the arguments. `dimensions`: names, and what to add to a size for the name's own ("taps-1": 1)."""

    steps: tuple[str, ...]
    dimensions: tuple[tuple[str, int], ...]
    integers: bool

    @property
    def name(self) -> str:
        """For errors."""
        return ".".join(self.steps)

    def of(self, inputs: Any) -> Tensor | None:
        """The tensor; None where there is none."""
        for step in self.steps:
            inputs = None if inputs is None else getattr(inputs, step)
        return inputs


class Shapes:
    """The allowed shapes of a named tuple's tensors. `multiples`: pairs of dimensions; the second divides the first."""

    def __init__(self, inputs: type, multiples: tuple[tuple[str, str], ...] = ()) -> None:
        self.multiples = multiples
        self.forms: dict[str, list[_Field]] = {}
        for field in _fields(inputs):
            self.forms.setdefault(field.name, []).append(field)

    def check(self, op: str, inputs: Any) -> None:
        """Compare.

        Raises:
            FusionTreeError: names the argument, the shape that it has to have, and the one that it has.
        """
        sizes: dict[str, int] = {}
        for name, forms in self.forms.items():
            tensor = forms[0].of(inputs)
            if tensor is not None and not any(_fits(form, tensor, sizes) for form in forms):
                kind = "integers" if forms[0].integers else "floating-point numbers"
                wanted = " or ".join(f"[{_wanted(form, sizes)}]" for form in forms)
                found = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                raise FusionTreeError(f"{op}: {name}: expected {kind} {wanted}, found {found}")
        for whole, part in self.multiples:
            if sizes[whole] % sizes[part]:
                raise FusionTreeError(f"{op}: {sizes[whole]} {whole} are not a multiple of {sizes[part]} {part}")


def _fits(field: _Field, tensor: Tensor, sizes: dict[str, int]) -> bool:
    """Whether a tensor agrees with the sizes known so far, which it adds to."""
    if field.integers == tensor.is_floating_point() or tensor.ndim != len(field.dimensions):
        return False
    pairs = zip(field.dimensions, tensor.shape, strict=True)
    return all(sizes.setdefault(name, size + more) == size + more for (name, more), size in pairs)


def _wanted(field: _Field, sizes: dict[str, int]) -> str:
    return ", ".join(str(sizes[name] - more) if name in sizes else name for name, more in field.dimensions)


def _fields(inputs: type, *above: str) -> Iterator[_Field]:
    """From annotations like `Int[Tensor, "batch time"] | None`; a named tuple inside is looked into."""
    for name, hint in get_type_hints(inputs).items():
        for kind in get_args(hint) or (hint,):
            if hasattr(kind, "dim_str"):
                dimensions = tuple(_dimension(text) for text in kind.dim_str.split())
                yield _Field((*above, name), dimensions, kind.dtypes == INTEGERS)
            elif hasattr(kind, "_fields"):
                yield from _fields(kind, *above, name)


def _dimension(text: str) -> tuple[str, int]:
    name, _, less = text.partition("-")
    return name, int(less or 0)
