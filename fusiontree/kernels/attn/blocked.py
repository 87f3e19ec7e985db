"""`attention` in blocks of queries over the slice of keys that they can see.

O(time * window) work, memory linear in time, and one (block x keys) mask at a time. Own backward: autograd
through slices would fill a whole gradient for each, which is quadratic again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.kernels.attn.blocks import FLASH_CPU, PRODUCT, Block, BlockKernel, Saved
from fusiontree.kernels.attn.op import ATTENTION, AttentionInputs, AttentionRequest, Sight
from fusiontree.kernels.documents import silence_padding, wide

QUERIES = 128


class Plan(NamedTuple):
    """What all blocks of a call have in common."""

    sight: Sight
    kernel: BlockKernel
    scale: float
    softcap: float | None


def _fold(queries: Float[Tensor, "b t heads d"], kv_heads: int) -> Float[Tensor, "b kv_heads t*share d"]:
    return rearrange(queries, "b t (hk share) d -> b hk (t share) d", hk=kv_heads)


def _unfold(rows: Float[Tensor, "b kv_heads t*share d"], time: int) -> Float[Tensor, "b t heads d"]:
    return rearrange(rows, "b hk (t share) d -> b t (hk share) d", t=time)


def _biases(plan: Plan, share: int, like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each block's queries, its keys, and their mask (built once where blocks look alike)."""
    sight, time, memo = plan.sight, like.shape[1], {}
    alike = sight.key_segments is None
    for start in range(0, time, QUERIES):
        queries = slice(start, min(start + QUERIES, time))
        keys = sight.keys_of(queries)
        shape = (queries.stop - queries.start, start - keys.start, keys.stop - start)
        if not alike or shape not in memo:
            hidden = ~repeat(sight.visible(queries, keys), "b t s -> b 1 (t share) s", share=share)
            memo = {shape: torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)}
            memo[shape].masked_fill_(hidden, -torch.inf)
        yield queries, keys, memo[shape]


def _blocks(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[slice, slice, Block]]:
    kv_heads = k.shape[2]
    for queries, keys, bias in _biases(plan, q.shape[2] // kv_heads, q):
        rows, seen_k, seen_v = (
            _fold(q[:, queries], kv_heads),
            k[:, keys].transpose(1, 2),
            v[:, keys].transpose(1, 2),
        )
        yield queries, keys, Block(rows, seen_k, seen_v, bias, plan.scale, plan.softcap)


class _Blocked(torch.autograd.Function):
    """Saves the output and the log of the sum of exponentials; backward recomputes the scores."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, sums = q.new_empty(*q.shape[:3], v.shape[-1]), []
        for queries, _, block in _blocks(plan, q, k, v):
            rows, lse = plan.kernel.forward(block)
            y[:, queries] = _unfold(rows, queries.stop - queries.start)
            sums.append(lse)
        ctx.save_for_backward(q, k, v, y, *sums)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, y, *sums = ctx.saved_tensors
        kv_heads, dtype = k.shape[2], wide(k.dtype)
        grad_q, grad_k, grad_v = (
            torch.empty_like(q),
            torch.zeros_like(k, dtype=dtype),
            torch.zeros_like(v, dtype=dtype),
        )
        for lse, (queries, keys, block) in zip(sums, _blocks(ctx.plan, q, k, v), strict=True):
            saved = Saved(_fold(y[:, queries], kv_heads), lse, _fold(grad[:, queries], kv_heads))
            rows, part_k, part_v = ctx.plan.kernel.backward(block, saved)
            grad_q[:, queries] = _unfold(rows, queries.stop - queries.start)
            grad_k[:, keys] += part_k.transpose(1, 2)
            grad_v[:, keys] += part_v.transpose(1, 2)
        return None, grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _run(inputs: AttentionInputs, kernel: BlockKernel) -> Float[Tensor, "batch time heads value_dim"]:
    keys, values = inputs.all_keys()
    plan = Plan(inputs.sight().with_document_starts(), kernel, inputs.scale, inputs.softcap)
    return silence_padding(_Blocked.apply(plan, inputs.q, keys, values), inputs.segments)


def flash_refusal(request: AttentionRequest) -> str | None:
    """Why torch's fused CPU kernel cannot serve, or None."""
    if request.device != "cpu":
        return f"torch's fused CPU kernel does not run on {request.device}"
    if request.softcap:
        return "torch's fused kernel has no softcap"
    return None if request.equal_widths else "torch's fused kernel wants value_dim = head_dim"


@ATTENTION.backend("blocked", priority=10)
def blocked(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Each block by matrix products with a softmax in the wide dtype: serves everything, everywhere."""
    return _run(inputs, PRODUCT)


@ATTENTION.backend("blocked_flash", priority=20, supports=flash_refusal)
def blocked_flash(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Each block by torch's fused CPU kernel."""
    return _run(inputs, FLASH_CPU)
