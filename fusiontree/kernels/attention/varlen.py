"""`attention` by FlashAttention-2 as torch ships it (`torch.nn.attention.varlen`, read at torch 2.11 and 2.13)."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fusiontree.compiling import constant
from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs, AttentionRequest, untraced
from fusiontree.kernels.attention.packing import KernelLimits, Tokens, over_documents, per_query_head
from fusiontree.kernels.common.documents import Packed

LIMITS = KernelLimits()


@constant
def built() -> bool:
    """Whether this torch has FlashAttention."""
    return torch.backends.cuda.is_flash_attention_available()


def _refusal(request: AttentionRequest) -> str | None:
    if request.device != "cuda":
        return "only on CUDA devices"
    return LIMITS.refusal(request) if built() else "torch was built without FlashAttention"


@cache
def load() -> Callable[..., Any]:
    """torch's function."""
    return import_module("torch.nn.attention.varlen").varlen_attn


@cache
def _shares_keys(function: Callable[..., Any]) -> bool:
    return "enable_gqa" in signature(function).parameters  # not in torch 2.11


@ATTENTION.backend("varlen", priority=28, supports=_refusal)
@untraced
def varlen(inputs: AttentionInputs) -> Tensor:
    """One call for all documents; a window counts the distance to the left."""
    attend, left = load(), -1 if inputs.window is None else inputs.window - 1

    def one_call(documents: Packed, q: Tokens, k: Tokens, v: Tokens) -> Tokens:
        shared = {"enable_gqa": q.shape[1] != k.shape[1]} if _shares_keys(attend) else {}
        if not shared:
            k, v = per_query_head(k, q.shape[1]), per_query_head(v, q.shape[1])
        bounds, longest = documents.bounds, documents.longest
        options = {"scale": inputs.scale, "window_size": (left, 0)}
        return attend(q, k, v, bounds, bounds, longest, longest, **options, **shared)

    return over_documents(inputs, one_call)
