"""Tensors in files that follow from the config: they may be there, with the values that we compute."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fusiontree.core.contracts.node import BranchSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.encodings.rope import Rope
from fusiontree.errors import WeightsError
from fusiontree.zoo.tensors import Part

FREQUENCIES = "rotary_emb.inv_freq"
"""How files before transformers 4.30 end the names of a rotation's frequencies, of which each layer has some."""
ROUNDING = 1e-5
"""How far frequencies that were computed in float32 are from exact ones, relative to them (theta is up to 1e11)."""
ROUNDING_OF_POWERS = 1e-3
"""The same of decays, exp(-base^n * m) for n and m up to hundreds; base is one of 2^(-8/heads)."""
UNITS_OFF = 2
"""How many units of its last place a decay's exponent may be off where it was computed in the dtype of the file: the
slope, its factor, their product and the power are each rounded, to half a unit."""


def check_computed(theirs: Mapping[str, Tensor], computed: Mapping[str, Callable[[], Tensor]]) -> set[str]:
    """Compare tensors with what we compute, where they are there; returns their names.

    Raises:
        WeightsError: one has other values.
    """
    there = {name for name in theirs if name in computed}
    for name in sorted(there):
        if not _same_powers(theirs[name], computed[name]()):
            raise WeightsError(f"tensor {name!r} has other values than those that follow from the config")
    return there


def check_frequencies(
    theirs: Mapping[str, Tensor], spec: ModelSpec, parts: Iterable[Part], copies: Mapping[str, str]
) -> set[str]:
    """Compare stored frequencies of rotations with those of the attention that they stand in; returns their names.

    One that stands in a module without a rotation is left for others to refuse.

    Raises:
        WeightsError: one has other values.
    """
    ours = {name: part.places() for part in parts for name in part.names()}
    ours |= {name: ours[first] for name, first in copies.items() if first in ours}
    checked: set[str] = set()
    for name in (name for name in theirs if name.endswith(FREQUENCIES)):
        module = name.removesuffix(FREQUENCIES)
        inside = [place for theirs_name, places in ours.items() if theirs_name.startswith(module) for place in places]
        wanted = [*_frequencies(spec, inside)]
        if wanted and not any(_same(theirs[name], each, ROUNDING) for each in wanted):
            raise WeightsError(f"tensor {name!r} has other frequencies than the rotation that the config describes")
        checked |= {name} if wanted else set()
    return checked


def _frequencies(spec: ModelSpec, inside: list[str]) -> Iterator[Tensor]:
    """Those that the branches with these parameters rotate by, each kind once."""
    found = dict.fromkeys(
        (name, channels)
        for path, node in spec.nodes()
        if isinstance(node, BranchSpec) and any(place.startswith(f"{path}.") for place in inside)
        for name in node.encodings
        for channels in node.channels()
    )
    for name, channels in found:
        rope = spec.encodings[name]
        if isinstance(rope, Rope):
            yield rope.frequencies(rope.dim or channels)


def _same_powers(found: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor holds these powers, computed in its own type: what rounds an exponent multiplies the power."""
    if not found.is_floating_point():
        return False
    exponents = wanted.double().clamp(min=torch.finfo(torch.float64).tiny).log().abs()
    rounding = torch.finfo(found.dtype).eps * UNITS_OFF * (1 + exponents)
    return _same(found, wanted, rounding.clamp(min=ROUNDING_OF_POWERS))


def _same(found: Tensor, wanted: Tensor, rounding: float | Tensor) -> bool:
    """Whether a tensor holds these values as its type can."""
    if found.shape != wanted.shape or not found.is_floating_point():
        return False
    kind = torch.finfo(found.dtype)
    allowed = torch.as_tensor(rounding).clamp(min=kind.eps) * wanted.double().abs() + kind.smallest_normal * kind.eps
    return bool(((found.double() - wanted.double()).abs() <= allowed).all())
