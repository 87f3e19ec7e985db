"""`attention` by the flash-attention packages (Dao et al., arXiv 2205.14135, 2307.08691, 2407.08608).

Read at flash-attn 2.8.3.post2, at the source of flash_attn_3 inside it, and at flash-attn-4 4.0.0b36.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs, AttentionRequest, untraced
from fusiontree.kernels.attention.packing import KernelLimits, Tokens, over_documents
from fusiontree.kernels.common.constants import constants
from fusiontree.kernels.common.documents import Packed
from fusiontree.kernels.common.packages import refusal


class FlashAttnLibrary(NamedTuple):
    """One of the packages; `unbounded` is how it writes a window without an end."""

    package: str
    oldest: str
    module: str
    unbounded: int | None
    limits: KernelLimits

    def refusal(self, request: AttentionRequest) -> str | None:
        """Why a request is not served, or None."""
        return refusal(request.device, self.package, self.oldest) or self.limits.refusal(request)


FLASH_2 = FlashAttnLibrary("flash-attn", "2.8", "flash_attn", -1, KernelLimits(multiple=1, softcap=True, slopes=True))
FLASH_3 = FlashAttnLibrary("flash-attn-3", "3.0", "flash_attn_interface", -1, KernelLimits(range(9, 10), softcap=True))
FLASH_4 = FlashAttnLibrary("flash-attn-4", "4.0.0", "flash_attn.cute", None, KernelLimits(range(9, 13), largest=128))


@cache
def load(module: str) -> Callable[..., Any]:
    """The library's function for documents one after another."""
    return import_module(module).flash_attn_varlen_func


def _slopes(slopes: tuple[float, ...], device: torch.device) -> Float[Tensor, "heads"]:
    """As the library wants them, whatever the queries are."""
    return constants(slopes, torch.float32, device)


def _run(inputs: AttentionInputs, library: FlashAttnLibrary) -> Tensor:
    left = library.unbounded if inputs.window is None else inputs.window - 1
    right = library.unbounded if inputs.window is None else 0
    alibi = {} if inputs.slopes is None else {"alibi_slopes": _slopes(inputs.slopes, inputs.q.device)}

    def one_call(documents: Packed, q: Tokens, k: Tokens, v: Tokens) -> Tokens:
        found = load(library.module)(
            q,
            k,
            v,
            cu_seqlens_q=documents.bounds,
            cu_seqlens_k=documents.bounds,
            max_seqlen_q=documents.longest,
            max_seqlen_k=documents.longest,
            softmax_scale=inputs.scale,
            causal=True,
            window_size=(left, right),
            softcap=inputs.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **alibi,
        )
        return found[0] if isinstance(found, tuple) else found  # some also give the log of the sum of exponentials

    return over_documents(inputs, one_call)


@ATTENTION.backend("flash_attn_3", priority=70, supports=FLASH_3.refusal)
@untraced
def flash_attn_3(inputs: AttentionInputs) -> Tensor:
    """For Hopper GPUs."""
    return _run(inputs, FLASH_3)


@ATTENTION.backend("flash_attn_4", priority=60, supports=FLASH_4.refusal)
@untraced
def flash_attn_4(inputs: AttentionInputs) -> Tensor:
    """For Hopper and Blackwell GPUs."""
    return _run(inputs, FLASH_4)


@ATTENTION.backend("flash_attn", priority=26, supports=FLASH_2.refusal)
@untraced
def flash_attn(inputs: AttentionInputs) -> Tensor:
    """What `varlen` is too, with softcap."""
    return _run(inputs, FLASH_2)
