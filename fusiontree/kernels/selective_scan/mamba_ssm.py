"""`selective_scan` by the CUDA kernel of mamba-ssm (`selective_scan_fn`, read at 2.3.2.post1).

The kernel starts from zeros, and the state that it returns has no gradient. Extra tokens replace both: tokens before
the sequence write one entry each of the initial state, tokens after it read one entry each of the final state.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from fusiontree.compiling import constant
from fusiontree.kernels.common.packages import refusal
from fusiontree.kernels.common.prepared import prepared
from fusiontree.kernels.selective_scan.op import SELECTIVE_SCAN, SelectiveScanInputs, SelectiveScanRequest, untraced

EXTENSION = "selective_scan_cuda"
LARGEST_STATE = 256
SHORT = 2.0**-40
"""A step in which nothing decays: exp(SHORT A) is 1 in float32 down to A = -2^15."""


def _refusal(request: SelectiveScanRequest) -> str | None:
    found = refusal(request.device, "mamba-ssm", "2.3") or _unbuilt()
    if found is not None:
        return found
    if request.dtype == torch.float64:
        return "has no float64"
    if request.state > LARGEST_STATE:
        return f"state must be at most {LARGEST_STATE}"
    return "has no document boundaries" if request.segments else None


@constant
def _unbuilt() -> str | None:
    return None if find_spec(EXTENSION) else f"mamba-ssm is installed without its extension {EXTENSION}"


@cache
def load() -> Callable[..., Any]:
    """The library's function."""
    return import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


@SELECTIVE_SCAN.backend("mamba_ssm", priority=20, supports=_refusal)
@untraced
def mamba_ssm(inputs: SelectiveScanInputs) -> tuple[Tensor, Tensor]:
    """All in float32: the kernel takes one dtype for x, dt, B and C, and steps are not to be rounded."""
    x, dt, A, B, C, state, _ = prepared(inputs)
    assert state is not None
    u, steps, writes, reads = (rearrange(values.to(dt.dtype), "b t ... -> b ... t") for values in (x, dt, B, C))
    each = repeat(torch.eye(A.shape[1], dtype=A.dtype, device=A.device), "n m -> b g n m", b=len(x), g=B.shape[2])
    none, still = torch.zeros_like(each), torch.zeros_like(state)
    y = load()(
        torch.cat([state / SHORT, u, still], -1),
        torch.cat([torch.full_like(still, SHORT), steps, still], -1),
        A,
        torch.cat([each, writes, none], -1),
        torch.cat([none, reads, each], -1),
    )
    _, outputs, final = y.split([A.shape[1], x.shape[1], A.shape[1]], -1)
    return rearrange(outputs, "b d t -> b t d").to(x.dtype), final
