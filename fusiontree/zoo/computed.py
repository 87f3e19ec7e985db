"""Tensors in files that follow from the config: files may hold them, with the values that FusionTree computes."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fusiontree.core.contracts.node import BranchSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.encodings.rope import Rope
from fusiontree.errors import WeightsError
from fusiontree.zoo.tensors import Part

FREQUENCIES = "rotary_emb.inv_freq"
"""How the names of rotation frequencies end; files from before transformers 4.30 hold them in each layer."""
ROUNDING = 1e-5
"""Largest relative error of frequencies that were computed in float32 (theta is up to 1e11)."""
ROUNDING_OF_POWERS = 1e-3
"""Largest relative error of decays, exp(-base^n * m) with base 2^(-8/heads) and n and m up to hundreds."""
UNITS_OFF = 2
"""Largest error of a decay's exponent, in units in the last place, if it was computed in the dtype of the file. The
slope, its factor, their product and the power are each rounded to half a unit."""


def check_computed(theirs: Mapping[str, Tensor], computed: Mapping[str, Callable[[], Tensor]]) -> set[str]:
    """Compare the stored tensors that are in `computed` with the computed values; returns their names.

    Raises:
        WeightsError: a tensor has other values.
    """
    there = {name for name in theirs if name in computed}
    for name in sorted(there):
        if not _same_powers(theirs[name], computed[name]()):
            raise WeightsError(f"tensor {name!r} has other values than those that follow from the config")
    return there


def check_frequencies(
    theirs: Mapping[str, Tensor], spec: ModelSpec, parts: Iterable[Part], copies: Mapping[str, str]
) -> set[str]:
    """Compare stored frequencies with the rotations of the module that holds them; returns the names compared.

    Frequencies in a module without a rotation are not compared: `to_ours` refuses them as extra tensors.

    Raises:
        WeightsError: a tensor has other values.
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
    """Yields the frequencies of the rotations in the branches that have these parameters, without repeats."""
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
    """Whether a tensor holds these powers, computed in its dtype. Rounding an exponent scales the power."""
    if not found.is_floating_point():
        return False
    exponents = wanted.double().clamp(min=torch.finfo(torch.float64).tiny).log().abs()
    rounding = torch.finfo(found.dtype).eps * UNITS_OFF * (1 + exponents)
    return _same(found, wanted, rounding.clamp(min=ROUNDING_OF_POWERS))


def _same(found: Tensor, wanted: Tensor, rounding: float | Tensor) -> bool:
    """Whether a tensor holds these values, up to the relative error `rounding` and the precision of its dtype."""
    if found.shape != wanted.shape or not found.is_floating_point():
        return False
    kind = torch.finfo(found.dtype)
    allowed = torch.as_tensor(rounding).clamp(min=kind.eps) * wanted.double().abs() + kind.smallest_normal * kind.eps
    return bool(((found.double() - wanted.double()).abs() <= allowed).all())
