"""`attention` by FlexAttention (`torch.nn.attention.flex_attention`, Dong et al. 2024, arXiv 2412.05496).

Window and documents become one number a query: the first key that it sees. The numbers of a block's first and last
query tell which blocks of 128 x 128 are visible, so no time x time mask is made.
"""

import os
from collections.abc import Callable
from shutil import which
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree import compiling, machine
from fusiontree.compiling import constant
from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs, AttentionRequest, untraced
from fusiontree.kernels.common.constants import constants
from fusiontree.kernels.common.documents import silence_padding
from fusiontree.kernels.registry import UnsupportedError

BLOCK = 128
NARROWEST = 16
"""The least width that Triton's matrix products take."""


class FlexBlocks(NamedTuple):
    """Which blocks of keys each block of queries sees: how many, and which those are."""

    count: Int[Tensor, "batch 1 blocks"]
    index: Int[Tensor, "batch 1 blocks blocks"]


def visible(first: Int[Tensor, "batch time"]) -> tuple[FlexBlocks, FlexBlocks]:
    """The blocks that some queries see some keys of, and those that all queries see all of.

    The first are an edge on the left, which the window and documents cut, and the queries' own block.
    """
    time = first.shape[1]
    own = torch.arange(0, time, BLOCK, device=first.device)
    last = first[:, (own + BLOCK - 1).clamp(max=time - 1)]
    own = own // BLOCK
    left = first[:, ::BLOCK] // BLOCK
    whole = torch.minimum((last + BLOCK - 1) // BLOCK, own)
    edge = torch.where(own < (whole - left)[..., None], left[..., None] + own, own[:, None])
    inside = (whole[..., None] + own).clamp(max=len(own) - 1)
    return _blocks(whole - left + 1, edge), _blocks(own - whole, inside)


def _blocks(count: Tensor, index: Tensor) -> FlexBlocks:
    return FlexBlocks(count[:, None].int(), index[:, None].int())


def _mask(first: Int[Tensor, "batch time"]) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    some, all_ = visible(first)
    size = first.shape[1]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[row, query])

    return BlockMask.from_kv_blocks(*some, *all_, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(size, size))


def _scoring(inputs: AttentionInputs) -> Callable[..., Tensor] | None:
    softcap = inputs.softcap
    slopes = None if inputs.slopes is None else constants(inputs.slopes, torch.float32, inputs.q.device)
    if softcap is None and slopes is None:
        return None

    def scored(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return score if slopes is None else score - slopes[head] * (query - key)

    return scored


def _run(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (tensor.transpose(1, 2) for tensor in inputs[:3])
    first = inputs.visibility().first_visible.expand(len(q), -1).int().contiguous()
    attend: Any = compiling.piece(flex_attention, compiled=True)
    options = {"score_mod": _scoring(inputs), "enable_gqa": q.shape[1] != k.shape[1]}
    y = attend(q, k, v, block_mask=_mask(first), scale=inputs.scale, **options)
    return silence_padding(y.transpose(1, 2), inputs.segments)


@constant
def compiler() -> str | None:
    """A C compiler, which Triton needs; trying one out, as `machine.compile_refusal` does, would take seconds."""
    return os.environ.get("CC") or which("cc") or which("gcc") or which("clang")


def _refusal(request: AttentionRequest) -> str | None:
    if request.device != "cuda":
        return "only on CUDA devices"
    if compiler() is None:
        return "Triton needs a C compiler, and none is installed"
    narrow = min(request.head_dim, request.value_dim) < NARROWEST
    return _unserved(request) or (f"head_dim and value_dim must be at least {NARROWEST}" if narrow else None)


def _cpu_refusal(request: AttentionRequest) -> str | None:
    if request.device != "cpu":
        return "only on the CPU"
    return _unserved(request) or ("has no gradients on the CPU" if request.gradients else None)


def _unserved(request: AttentionRequest) -> str | None:
    if request.dtype == torch.float64:
        return "has no float64"
    if request.prefix:
        return "serves no prefix"
    return "serves no cached keys" if request.past else None


@ATTENTION.backend("flex", priority=15, supports=_refusal)
@untraced
def flex(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Compiled for each shape; serves what FlashAttention does not."""
    return _run(inputs)


@ATTENTION.backend("flex_cpu", priority=5, supports=_cpu_refusal)
@untraced
def flex_cpu(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Without gradients, and never picked by itself: it takes seconds to find out whether there is a compiler."""
    found = machine.compile_refusal("cpu")
    if found is not None:
        raise UnsupportedError(f"attention backend 'flex_cpu' cannot serve this call: nothing can be compiled: {found}")
    return _run(inputs)
