"""Refusing what does not fit before anything is allocated."""

import os

import torch

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


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
        known = all(name in getattr(os, "sysconf_names", {}) for name in names)
        return os.sysconf(names[0]) * os.sysconf(names[1]) if known else None


def check_room(needed: int, device: torch.device, *, what: str = "weights") -> None:
    """Refuse to allocate more than there is.

    Raises:
        WeightsError: with the bytes needed and free.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise WeightsError(f"{what}: {needed} bytes are needed on {device}, {free} are free")
