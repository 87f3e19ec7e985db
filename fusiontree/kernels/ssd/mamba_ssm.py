"""`ssd` by the Triton kernels of mamba-ssm (`mamba_ssm.ops.triton.ssd_combined`, read at 2.3.2.post1)."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor

from fusiontree.kernels.common.documents import padding_joined, silence_padding
from fusiontree.kernels.common.packages import half, installed, refusal
from fusiontree.kernels.common.prepared import prepared
from fusiontree.kernels.ssd.op import SSD, SSDInputs, SSDRequest, untraced

CHUNK = 256
BARE = (2, 3)
"""The releases whose kernels are known to need nothing of what importing their package imports."""


def _refusal(request: SSDRequest) -> str | None:
    return refusal(request.device, "mamba-ssm", "2.3") or half(request.dtype)


@contextmanager
def _bare(package: str) -> Generator[None]:
    """Let modules of a package be imported without its own `__init__` running."""
    spec = find_spec(package)
    assert spec is not None
    module: Any = ModuleType(package)
    module.__path__ = spec.submodule_search_locations
    sys.modules[package] = module
    try:
        yield
    finally:
        del sys.modules[package]


@cache
def load() -> Callable[..., Any]:
    """The library's function; released packages cannot be imported without a compiled extension of Mamba-1's."""
    name = "mamba_ssm.ops.triton.ssd_combined"
    if "mamba_ssm" in sys.modules or (installed("mamba-ssm") or BARE)[:2] != BARE:
        return import_module(name).mamba_chunk_scan_combined
    with _bare("mamba_ssm"):
        return import_module(name).mamba_chunk_scan_combined


@SSD.backend("mamba_ssm", priority=40, supports=_refusal)
@untraced
def mamba_ssm(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """One call for all documents: the kernels too take an initial state for what segment 0 continues, and no other.

    The states that chunks start from, and the gradient of the initial one, are rounded to x's dtype.
    """
    x, dt, A, B, C, _, segments = prepared(inputs)
    joined = None if segments is None else padding_joined(segments).int()
    initial = None if inputs.initial_state is None else inputs.initial_state.to(dt.dtype)
    y, final = load()(
        x, dt, A, B, C, chunk_size=CHUNK, initial_states=initial, seq_idx=joined, return_final_states=True
    )
    return silence_padding(y, segments), final
