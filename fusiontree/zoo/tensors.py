"""Correspondences between the tensors of a public family (theirs) and those of FusionTree (ours): a family declares
each one once, for both directions."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fusiontree.errors import WeightsError, suggest


class View(NamedTuple):
    """Rearranges a tensor of theirs so that ours can be cut from it, and back; values are only moved."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


PLAIN = View(lambda tensor: tensor, lambda tensor: tensor)
TAPS = View(lambda tensor: tensor.squeeze(1), lambda tensor: tensor.unsqueeze(1))
"""A depthwise convolution's [channels, 1, taps] as [channels, taps]."""


def interleaved(groups: int, *sizes: int) -> View:
    """A view of a map whose rows are grouped: each of `groups` groups has `sizes[i]` rows of part i. `read` moves the
    rows of each part together, one part behind the other.

    >>> interleaved(2, 1, 2).read(torch.tensor([0, 10, 11, 1, 12, 13]))
    tensor([ 0,  1, 10, 11, 12, 13])
    """

    def read(tensor: Tensor) -> Tensor:
        if tensor.shape[0] != groups * sum(sizes):
            return tensor  # `Renamed.read` reports the number of rows
        parts = tensor.unflatten(0, (groups, sum(sizes))).split(sizes, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def write(tensor: Tensor) -> Tensor:
        parts = tensor.split([groups * size for size in sizes])
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    return View(read, write)


class Part(Protocol):
    """A correspondence: tensors of theirs and tensors of ours that hold the same values."""

    def names(self) -> tuple[str, ...]:
        """The names of their tensors."""
        ...

    def places(self) -> tuple[str, ...]:
        """The names of our tensors."""
        ...

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields our tensors with their names."""
        ...

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields their tensors with their names."""
        ...

    def within(self, theirs: str, ours: str) -> Self:
        """This correspondence with `theirs` and `ours` put in front of the names."""
        ...


PartT = TypeVar("PartT", bound=Part)


class Renamed(NamedTuple):
    """A tensor of theirs that holds one or more tensors of ours, concatenated along the dimension `dim`.

    `rows`: the size of each of our tensors along `dim`; may be left out for a single tensor.
    """

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[int, ...] = ()
    view: View = PLAIN
    dim: int = 0

    def names(self) -> tuple[str, ...]:
        """The name of their tensor."""
        return (self.theirs,)

    def places(self) -> tuple[str, ...]:
        """The names of our tensors that it holds."""
        return self.ours

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields our tensors with their names."""
        whole = self.view.read(theirs[self.theirs])
        if len(self.ours) == 1:
            yield self.ours[0], whole
            return
        found = whole.shape[self.dim] if whole.ndim > self.dim else 0
        if found != sum(self.rows):
            raise WeightsError(f"tensor {self.theirs!r}: found {found} rows, the config says {sum(self.rows)}")
        yield from zip(self.ours, whole.split(self.rows, self.dim), strict=True)

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields their tensors with their names."""
        parts = [ours[name] for name in self.ours]
        yield self.theirs, self.view.write(parts[0] if len(parts) == 1 else torch.cat(parts, self.dim))

    def within(self, theirs: str, ours: str) -> Self:
        """This correspondence with `theirs` and `ours` put in front of the names."""
        return self._replace(theirs=f"{theirs}{self.theirs}", ours=tuple(f"{ours}{name}" for name in self.ours))


class Stacked(NamedTuple):
    """A tensor of ours that stacks tensors of theirs along a new first dimension."""

    theirs: tuple[str, ...]
    ours: str

    def names(self) -> tuple[str, ...]:
        """The names of all their tensors."""
        return self.theirs

    def places(self) -> tuple[str, ...]:
        """The name of our tensor."""
        return (self.ours,)

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields our tensors with their names."""
        parts = [theirs[name] for name in self.theirs]
        for name, part in zip(self.theirs, parts, strict=True):
            if part.shape != parts[0].shape:
                found = f"has the shape {tuple(part.shape)}, the first of its stack {tuple(parts[0].shape)}"
                raise WeightsError(f"tensor {name!r} {found}")
        yield self.ours, torch.stack(parts)

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields their tensors with their names."""
        yield from zip(self.theirs, ours[self.ours].unbind(), strict=True)

    def within(self, theirs: str, ours: str) -> Self:
        """This correspondence with `theirs` and `ours` put in front of the names."""
        return self._replace(theirs=tuple(f"{theirs}{name}" for name in self.theirs), ours=f"{ours}{self.ours}")


class Concatenated(NamedTuple):
    """Tensors of theirs that `whole` describes as one concatenated tensor; each is written from one tensor of ours."""

    theirs: tuple[str, ...]
    whole: Renamed

    def names(self) -> tuple[str, ...]:
        """The names of all their tensors."""
        return self.theirs

    def places(self) -> tuple[str, ...]:
        """The names of our tensors in the whole."""
        return self.whole.places()

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields our tensors with their names; their tensors may be cut at other rows than ours."""
        yield from self.whole.read({self.whole.theirs: torch.cat([theirs[name] for name in self.theirs])})

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields their tensors with their names."""
        ((_, tensor),) = self.whole.write(ours)
        yield from zip(self.theirs, tensor.split(self.whole.rows or len(tensor)), strict=True)

    def within(self, theirs: str, ours: str) -> Self:
        """This correspondence with `theirs` and `ours` put in front of the names."""
        names = tuple(f"{theirs}{name}" for name in self.theirs)
        return self._replace(theirs=names, whole=self.whole.within(theirs, ours))


class Aliased(NamedTuple):
    """A tensor of theirs that has another name in some files; it is written under the first name."""

    first: Renamed
    other: str

    def names(self) -> tuple[str, ...]:
        """The first name."""
        return self.first.names()

    def places(self) -> tuple[str, ...]:
        """The names of our tensors that it holds."""
        return self.first.places()

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields our tensors with their names."""
        yield from self.in_names(theirs).read(theirs)

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields their tensors with their names."""
        yield from self.first.write(ours)

    def within(self, theirs: str, ours: str) -> Self:
        """This correspondence with `theirs` and `ours` put in front of the names."""
        return self._replace(first=self.first.within(theirs, ours), other=f"{theirs}{self.other}")

    def in_names(self, theirs: Container[str]) -> Renamed:
        """The correspondence under the name that is in `theirs`."""
        here = self.first.theirs not in theirs and self.other in theirs
        return self.first._replace(theirs=self.other) if here else self.first


class Deduplicated(Mapping[str, Tensor]):
    """Tensors of which some may have several names; here each has only its first name.

    Args:
        whole: all tensors. Tensors with several names are read at once, to compare them; others are read on access.
        copies: maps each further name of a tensor to its first name. Any of the names may be absent.

    Raises:
        WeightsError: one tensor has other values under another of its names.
    """

    def __init__(self, whole: Mapping[str, Tensor], copies: Mapping[str, str]) -> None:
        self._whole = whole
        self._places: dict[str, str] = {}
        for name in whole:
            place = self._places.setdefault(copies.get(name, name), name)
            if place != name and not torch.equal(whole[place], whole[name]):
                raise WeightsError(f"tensor {name!r} has other values than {place!r}, which is the same one")

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def linear(theirs: str, ours: str, bias: bool = False) -> Iterator[Renamed]:
    """A linear map."""
    yield Renamed(f"{theirs}.weight", (f"{ours}.weight",))
    if bias:
        yield Renamed(f"{theirs}.bias", (f"{ours}.bias",))


def below(theirs: str, ours: str, parts: Iterable[PartT]) -> Iterator[PartT]:
    """Moves correspondences into a module: `theirs.` and `ours.` are put in front of the names."""
    yield from (part.within(f"{theirs}.", f"{ours}.") for part in parts)


def within(theirs: str, parts: Iterable[PartT]) -> Iterator[PartT]:
    """Moves correspondences into a module of theirs; our names stay."""
    yield from (part.within(f"{theirs}.", "") for part in parts)


def to_ours(parts: Iterable[Part], theirs: Mapping[str, Tensor], *, ignored: Iterable[str] = ()) -> dict[str, Tensor]:
    """Their tensors under our names.

    Raises:
        WeightsError: a tensor is missing, or the config does not ask for a tensor that is there.
    """
    parts = [part.in_names(theirs) if isinstance(part, Aliased) else part for part in parts]
    known = [name for part in parts for name in part.names()]
    for name in known:
        if name not in theirs:
            raise WeightsError(f"tensor {name!r} is missing")
    extra = sorted(set(theirs) - set(known) - set(ignored))
    if extra:
        raise WeightsError(f"tensor {extra[0]!r} is not one that the config asks for{suggest(extra[0], known):.200}")
    return {name: tensor for part in parts for name, tensor in part.read(theirs)}


def to_theirs(parts: Iterable[Part], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names."""
    return {name: tensor for part in parts for name, tensor in part.write(ours)}
