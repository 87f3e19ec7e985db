"""`ssd` by flash-linear-attention's Triton kernels (`fla.ops.simple_gla`, read at fla-core 0.6.0)."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from einops import repeat
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.documents import Packed, packed, silence_padding
from fusiontree.kernels.common.packages import capability, half, missing, refusal
from fusiontree.kernels.common.prepared import prepared
from fusiontree.kernels.ssd.op import SSD, SSDInputs, SSDRequest, untraced

HOPPER = 9


def _refusal(request: SSDRequest) -> str | None:
    found = refusal(request.device, "fla-core", "0.6") or half(request.dtype)
    return _gradient_refusal(request) if found is None and request.gradients else found


def _gradient_refusal(request: SSDRequest) -> str | None:
    if not request.even:
        return "has no gradients where head_dim or state is odd"
    if capability()[0] == HOPPER and missing("triton", "3.7.1") and missing("tilelang", "0"):
        return "has no gradients on Hopper GPUs before Triton 3.7.1"
    return None


@cache
def load() -> Callable[..., Any]:
    """The library's function."""
    return import_module("fla.ops.simple_gla").chunk_simple_gla


def _per_head(values: Float[Tensor, "batch time groups state"], heads: int) -> Float[Tensor, "batch time heads state"]:
    return repeat(values, "b t g n -> b t (g share) n", share=heads // values.shape[2])


@SSD.backend("fla", priority=30, supports=_refusal)
@untraced
def fla(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """Gated linear attention with one gate a head: q is C, k is B, v is dt x, and the log of the gate is dt A."""
    x, dt, A, B, C, state, segments = prepared(inputs)
    assert state is not None
    heads = x.shape[2]
    tokens = [_per_head(C, heads), _per_head(B, heads), (x * dt[..., None]).to(x.dtype), dt * A]
    if segments is None:
        return _attend(tokens, state)
    documents = packed(segments, x)
    y, states = _attend([documents.pack(one)[None] for one in tokens], documents.entering(state), documents)
    return silence_padding(documents.unpack(y[0]), segments), documents.leaving(states, state)


def _attend(tokens: list[Tensor], state: Tensor, documents: Packed | None = None) -> tuple[Tensor, Tensor]:
    bounds = {} if documents is None else {"cu_seqlens": documents.bounds, "cu_seqlens_cpu": documents.host}
    options = {"initial_state": state, "output_final_state": True, "state_v_first": True}
    return load()(*tokens, scale=1.0, **options, **bounds)
