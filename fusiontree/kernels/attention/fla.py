"""`attention` by flash-linear-attention's Triton kernels (`fla.ops.attn.parallel_attn`, read at fla-core 0.6.0)."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs, AttentionRequest, untraced
from fusiontree.kernels.attention.packing import KernelLimits, Tokens, over_documents
from fusiontree.kernels.common.documents import Packed
from fusiontree.kernels.common.packages import refusal

LIMITS = KernelLimits(multiple=1, unequal_widths=True)


def _refusal(request: AttentionRequest) -> str | None:
    return refusal(request.device, "fla-core", "0.6") or LIMITS.refusal(request)


@cache
def load() -> Callable[..., Any]:
    """The library's function."""
    return import_module("fla.ops.attn").parallel_attn


@ATTENTION.backend("fla", priority=22, supports=_refusal)
@untraced
def fla(inputs: AttentionInputs) -> Tensor:
    """One call for all documents; a window counts keys, and each makes Triton compile its own kernels."""

    def one_call(documents: Packed, q: Tokens, k: Tokens, v: Tokens) -> Tokens:
        options = {"scale": inputs.scale, "window_size": inputs.window, "cu_seqlens": documents.bounds}
        return load()(q[None], k[None], v[None], **options)[0]

    return over_documents(inputs, one_call)
