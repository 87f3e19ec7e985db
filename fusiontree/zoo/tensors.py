"""The tensors of one checkpoint under the names of another: a family says once how they correspond, and both
directions follow."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, Self, TypeVar

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


class Part(Protocol):
    """Some of their tensors and some of ours that hold the same numbers."""

    def names(self) -> tuple[str, ...]:
        """Those of theirs."""
        ...

    def places(self) -> tuple[str, ...]:
        """The names of ours."""
        ...

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Ours."""
        ...

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Theirs."""
        ...

    def within(self, theirs: str, ours: str) -> Self:
        """The same below a prefix on either side."""
        ...


PartT = TypeVar("PartT", bound=Part)


class Renamed(NamedTuple):
    """One of their tensors, and ours that stand in it one behind the other.

    `rows`: the size of each of ours along the dimension `dim`; may be left out for a single one.
    """

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[int, ...] = ()
    view: View = PLAIN
    dim: int = 0

    def names(self) -> tuple[str, ...]:
        """The one."""
        return (self.theirs,)

    def places(self) -> tuple[str, ...]:
        """Ours that stand in it."""
        return self.ours

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Ours."""
        whole = self.view.read(theirs[self.theirs])
        if len(self.ours) == 1:
            yield self.ours[0], whole
            return
        found = whole.shape[self.dim] if whole.ndim > self.dim else 0
        if found != sum(self.rows):
            raise WeightsError(f"tensor {self.theirs!r}: found {found} rows, the config says {sum(self.rows)}")
        yield from zip(self.ours, whole.split(self.rows, self.dim), strict=True)

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Theirs."""
        parts = [ours[name] for name in self.ours]
        yield self.theirs, self.view.write(parts[0] if len(parts) == 1 else torch.cat(parts, self.dim))

    def within(self, theirs: str, ours: str) -> Self:
        """The same below a prefix on either side."""
        return self._replace(theirs=f"{theirs}{self.theirs}", ours=tuple(f"{ours}{name}" for name in self.ours))


class Stacked(NamedTuple):
    """One of our tensors, whose parts along the first dimension are tensors of theirs."""

    theirs: tuple[str, ...]
    ours: str

    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.theirs

    def places(self) -> tuple[str, ...]:
        """The one."""
        return (self.ours,)

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Ours."""
        parts = [theirs[name] for name in self.theirs]
        for name, part in zip(self.theirs, parts, strict=True):
            if part.shape != parts[0].shape:
                found = f"has the shape {tuple(part.shape)}, the first of its stack {tuple(parts[0].shape)}"
                raise WeightsError(f"tensor {name!r} {found}")
        yield self.ours, torch.stack(parts)

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Theirs."""
        yield from zip(self.theirs, ours[self.ours].unbind(), strict=True)

    def within(self, theirs: str, ours: str) -> Self:
        """The same below a prefix on either side."""
        return self._replace(theirs=tuple(f"{theirs}{name}" for name in self.theirs), ours=f"{ours}{self.ours}")


class Concatenated(NamedTuple):
    """Tensors of theirs that are one in `whole`, each of them one of ours there."""

    theirs: tuple[str, ...]
    whole: Renamed

    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.theirs

    def places(self) -> tuple[str, ...]:
        """Ours that stand in the whole."""
        return self.whole.places()

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Ours, wherever theirs are cut."""
        yield from self.whole.read({self.whole.theirs: torch.cat([theirs[name] for name in self.theirs])})

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Theirs."""
        ((_, tensor),) = self.whole.write(ours)
        yield from zip(self.theirs, tensor.split(self.whole.rows or len(tensor)), strict=True)

    def within(self, theirs: str, ours: str) -> Self:
        """The same below a prefix on either side."""
        names = tuple(f"{theirs}{name}" for name in self.theirs)
        return self._replace(theirs=names, whole=self.whole.within(theirs, ours))


class Aliased(NamedTuple):
    """A tensor of theirs that some files call by another name; written under the first."""

    first: Renamed
    other: str

    def names(self) -> tuple[str, ...]:
        """The first one."""
        return self.first.names()

    def places(self) -> tuple[str, ...]:
        """Ours that stand in it."""
        return self.first.places()

    def read(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Ours."""
        yield from self.in_names(theirs).read(theirs)

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Theirs."""
        yield from self.first.write(ours)

    def within(self, theirs: str, ours: str) -> Self:
        """The same below a prefix on either side."""
        return self._replace(first=self.first.within(theirs, ours), other=f"{theirs}{self.other}")

    def in_names(self, theirs: Container[str]) -> Renamed:
        """With the name that is there."""
        here = self.first.theirs not in theirs and self.other in theirs
        return self.first._replace(theirs=self.other) if here else self.first


class Deduplicated(Mapping[str, Tensor]):
    """Tensors of which some may stand there under several names; here each has its first name alone.

    Args:
        whole: all of them. Those with several names are read, to be compared; the others when they are asked for.
        copies: the first name of a tensor by each further one. Any of the names may be absent.

    Raises:
        WeightsError: two that should be one are not equal.
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
    """Correspondences inside a module."""
    yield from (part.within(f"{theirs}.", f"{ours}.") for part in parts)


def within(theirs: str, parts: Iterable[PartT]) -> Iterator[PartT]:
    """Correspondences inside a module of theirs."""
    yield from (part.within(f"{theirs}.", "") for part in parts)


def to_ours(parts: Iterable[Part], theirs: Mapping[str, Tensor], *, ignored: Iterable[str] = ()) -> dict[str, Tensor]:
    """Their tensors under our names.

    Raises:
        WeightsError: one is missing, or there is one that the config does not ask for.
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
