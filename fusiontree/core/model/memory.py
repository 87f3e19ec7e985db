"""Refusing what does not fit before anything is allocated."""

import torch

from fusiontree import machine
from fusiontree.errors import FusionTreeError, WeightsError


def usable(device: torch.device | str) -> torch.device:
    """A device that tensors can be made on.

    Raises:
        FusionTreeError: no such device, or none of its kind on this machine.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise FusionTreeError(
            f"device: {str(device)!r} cannot be used here: {str(error).splitlines()[0]:.120}"
        ) from None


def check_room(needed: int, device: torch.device, *, what: str = "weights") -> None:
    """Refuse to allocate more than there is.

    Raises:
        WeightsError: with the bytes needed and free.
    """
    free = machine.free_bytes(device)
    if free is not None and needed > free:
        raise WeightsError(f"{what}: {needed} bytes do not fit on {device}, {free} are free")
