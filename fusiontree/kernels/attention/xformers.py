"""`attention` by xformers (`memory_efficient_attention` and its masks, read at 0.0.35)."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs, AttentionRequest, untraced
from fusiontree.kernels.attention.packing import KernelLimits, Tokens, over_documents, per_query_head
from fusiontree.kernels.common.documents import Packed
from fusiontree.kernels.common.packages import refusal

LIMITS = KernelLimits()


def _refusal(request: AttentionRequest) -> str | None:
    return refusal(request.device, "xformers", "0.0.35") or LIMITS.refusal(request)


class XformersLibrary(NamedTuple):
    """What is called of it."""

    attend: Callable[..., Any]
    mask: Any
    """The class `BlockDiagonalMask`."""


@cache
def load() -> XformersLibrary:
    """The library's function and mask."""
    fmha = import_module("xformers.ops").fmha
    return XformersLibrary(fmha.memory_efficient_attention, fmha.attn_bias.BlockDiagonalMask)


@ATTENTION.backend("xformers", priority=24, supports=_refusal)
@untraced
def xformers(inputs: AttentionInputs) -> Tensor:
    """One call for all documents; a window counts keys. Keys are repeated: xformers has no gradients for shared
    ones."""
    library = load()

    def one_call(documents: Packed, q: Tokens, k: Tokens, v: Tokens) -> Tokens:
        lengths = documents.host.diff().tolist()
        mask = library.mask.from_seqlens(lengths, device=q.device)
        mask = mask.make_causal() if inputs.window is None else mask.make_local_attention(inputs.window)
        k, v = per_query_head(k, q.shape[1]), per_query_head(v, q.shape[1])
        return library.attend(q[None], k[None], v[None], attn_bias=mask, scale=inputs.scale)[0]

    return over_documents(inputs, one_call)
