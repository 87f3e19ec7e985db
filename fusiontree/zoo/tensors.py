"""The tensors of one checkpoint under the names of another: a family says once how they correspond, and both
directions follow."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.errors import WeightsError, suggest


class View(NamedTuple):
    """A tensor of theirs in the shape in which ours are cut from it, and back; values are only moved."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


PLAIN = View(lambda tensor: tensor, lambda tensor: tensor)
TAPS = View(lambda tensor: tensor.squeeze(1), lambda tensor: tensor.unsqueeze(1))
"""A depthwise convolution's [channels, 1, taps] as [channels, taps]."""


def interleaved(groups: int, *sizes: int) -> View:
    """A map whose rows stand group by group, so many rows of each part in a group; ours are whole, one part behind
    the other.

    >>> interleaved(2, 1, 2).read(torch.tensor([0, 10, 11, 1, 12, 13]))
    tensor([ 0,  1, 10, 11, 12, 13])
    """

    def read(tensor: Tensor) -> Tensor:
        if tensor.shape[0] != groups * sum(sizes):
            return tensor  # which then has not the rows that the config says
        parts = tensor.unflatten(0, (groups, sum(sizes))).split(sizes, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def write(tensor: Tensor) -> Tensor:
        parts = tensor.split([groups * size for size in sizes])
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    return View(read, write)


class Same(NamedTuple):
    """One of their tensors, and ours that stand in it one behind the other along the first dimension.

    `rows`: the size of each of ours; may be left out for a single one.
    """

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[int, ...] = ()
    view: View = PLAIN

    def read(self, theirs: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Ours."""
        whole = self.view.read(theirs)
        if len(self.ours) == 1:
            yield self.ours[0], whole
            return
        if whole.shape[0] != sum(self.rows):
            raise WeightsError(f"tensor {self.theirs!r}: found {whole.shape[0]} rows, the config says {sum(self.rows)}")
        yield from zip(self.ours, whole.split(self.rows), strict=True)

    def write(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Theirs."""
        parts = [ours[name] for name in self.ours]
        return self.view.write(parts[0] if len(parts) == 1 else torch.cat(parts))

    def within(self, theirs: str, ours: str) -> "Same":
        """The same below a prefix on either side."""
        return self._replace(theirs=f"{theirs}{self.theirs}", ours=tuple(f"{ours}{name}" for name in self.ours))


def linear(theirs: str, ours: str, bias: bool = False) -> Iterator[Same]:
    """A linear map."""
    yield Same(f"{theirs}.weight", (f"{ours}.weight",))
    if bias:
        yield Same(f"{theirs}.bias", (f"{ours}.bias",))


def below(theirs: str, ours: str, parts: Iterable[Same]) -> Iterator[Same]:
    """Correspondences inside a module."""
    yield from (part.within(f"{theirs}.", f"{ours}.") for part in parts)


def joined(theirs: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> Mapping[str, Tensor]:
    """Tensors with those under other names made of them: of `names[name]`, one behind the other, where they are there.

    >>> joined({"a": torch.zeros(1), "b": torch.ones(2), "c": torch.ones(1)}, {"ab": ("a", "b"), "d": ("e",)})
    {'c': tensor([1.]), 'ab': tensor([0., 1., 1.])}
    """
    made = {name: parts for name, parts in names.items() if all(part in theirs for part in parts)}
    if not made:
        return theirs
    used = {part for parts in made.values() for part in parts}
    rest = {name: theirs[name] for name in theirs if name not in used}
    return rest | {name: torch.cat([theirs[part] for part in parts]) for name, parts in made.items()}


def to_ours(parts: Iterable[Same], theirs: Mapping[str, Tensor], *, ignored: Iterable[str] = ()) -> dict[str, Tensor]:
    """Their tensors under our names.

    Raises:
        WeightsError: one is missing, or there is one that the config does not ask for.
    """
    parts = list(parts)
    known = {part.theirs for part in parts}
    for part in parts:
        if part.theirs not in theirs:
            raise WeightsError(f"tensor {part.theirs!r} is missing")
    extra = sorted(set(theirs) - known - set(ignored))
    if extra:
        raise WeightsError(f"tensor {extra[0]!r} is not one that the config asks for{suggest(extra[0], known):.200}")
    return {name: tensor for part in parts for name, tensor in part.read(theirs[part.theirs])}


def to_theirs(parts: Iterable[Same], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names."""
    return {part.theirs: part.write(ours) for part in parts}
