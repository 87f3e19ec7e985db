"""Finds the installed GPU kernel packages without importing them.

Results are constants inside graphs of `torch.compile`.
"""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from fusiontree.compiling import constant

HALF = (torch.float16, torch.bfloat16)


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparisons: "2.3.2.post1" is (2, 3, 2, 1)."""
    return tuple(map(int, re.findall(r"\d+", text)))


@cache
def installed(package: str) -> tuple[int, ...] | None:
    """The release of an installed package, or None."""
    try:
        return release(version(package))
    except PackageNotFoundError:
        return None


@constant
def missing(package: str, oldest: str) -> str | None:
    """Why a package cannot be used, or None; it may be of the release `oldest` or newer."""
    found = installed(package)
    if found is None:
        return f"{package} is not installed"
    if found < release(oldest):
        return f"{package} {oldest} or newer is needed, {version(package)} is installed"
    return None


@constant
def capability() -> tuple[int, int]:
    """The compute capability of NVIDIA's GPU; (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.version.cuda and torch.cuda.is_available() else (0, 0)


def half(dtype: torch.dtype) -> str | None:
    """Why kernels on matrix units cannot serve a dtype: they round float32 to TF32, and have no float64."""
    return None if dtype in HALF else "only float16 and bfloat16"


def refusal(device: str, package: str, oldest: str) -> str | None:
    """Why GPU kernels of a package cannot be used on a type of device, or None."""
    return "only on CUDA devices" if device != "cuda" else missing(package, oldest)
