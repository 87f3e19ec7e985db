"""Attention of one block of queries: forward with the log of the sum of exponentials, and backward from it.

Queries are folded, (batch, kv_heads, queries x share, head_dim): the query heads of a kv head are further rows of one
product, so that keys are never repeated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype


class AttentionBlock(NamedTuple):
    """The operands of one block; `bias` is -inf where a query does not see a key."""

    q: Float[Tensor, "batch kv_heads rows head_dim"]
    k: Float[Tensor, "batch kv_heads keys head_dim"]
    v: Float[Tensor, "batch kv_heads keys value_dim"]
    bias: Float[Tensor, "#batch #kv_heads rows keys"]
    scale: float
    softcap: float | None


class Saved(NamedTuple):
    """What backward needs of the forward pass, and the gradient that arrives."""

    y: Float[Tensor, "batch kv_heads rows value_dim"]
    lse: Float[Tensor, "batch kv_heads rows"]
    grad: Float[Tensor, "batch kv_heads rows value_dim"]


class BlockKernel(NamedTuple):
    """A way to compute a block: (y, lse), and (grad_q, grad_k, grad_v)."""

    forward: Callable[[AttentionBlock], tuple[Tensor, Tensor]]
    backward: Callable[[AttentionBlock, Saved], tuple[Tensor, Tensor, Tensor]]


def capped(scores: Float[Tensor, "..."], softcap: float | None) -> Float[Tensor, "..."]:
    """softcap * tanh(scores / softcap), in place (Gemma 2, arXiv 2408.00118)."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _scores(block: AttentionBlock) -> Float[Tensor, "batch kv_heads rows keys"]:
    """Scaled, capped, not yet masked; in the accumulation dtype, products included."""
    dtype = accumulation_dtype(block.q.dtype)
    return capped(block.q.to(dtype).mul(block.scale) @ block.k.to(dtype).mT, block.softcap)


def product_forward(block: AttentionBlock) -> tuple[Tensor, Tensor]:
    """Two matrix products and a softmax."""
    scores = _scores(block).add_(block.bias)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    return weights @ block.v.to(weights.dtype), lse


def product_backward(block: AttentionBlock, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputes the weights from `lse` (Dao et al. 2022, arXiv 2205.14135, algorithm 4); only scores need products
    in the accumulation dtype."""
    dtype = block.q.dtype
    scores = _scores(block)
    weights = torch.exp(scores + block.bias - saved.lse[..., None])
    grad_v = weights.to(dtype).mT @ saved.grad
    mean = (saved.grad.to(weights.dtype) * saved.y).sum(-1, keepdim=True)
    grad_scores = ((saved.grad @ block.v.mT) - mean) * weights * block.scale
    if block.softcap is not None:
        grad_scores = grad_scores * (1 - (scores / block.softcap) ** 2)
    grad_scores = grad_scores.to(dtype)
    return grad_scores @ block.k, grad_scores.mT @ block.q, grad_v


def _flash_options(block: AttentionBlock) -> dict[str, Any]:
    return {"attn_mask": block.bias, "scale": block.scale}


def flash_forward(block: AttentionBlock) -> tuple[Tensor, Tensor]:
    """torch's fused CPU kernel (no softcap, value_dim = head_dim)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        block.q, block.k, block.v, 0.0, False, **_flash_options(block)
    )


def flash_backward(block: AttentionBlock, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of torch's fused CPU kernel."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        saved.grad, block.q, block.k, block.v, saved.y, saved.lse, 0.0, False, **_flash_options(block)
    )


PRODUCT = BlockKernel(product_forward, product_backward)
FLASH_CPU = BlockKernel(flash_forward, flash_backward)


def flash_refusal(request: Any) -> str | None:
    """Why `FLASH_CPU` cannot serve a request of `attention` or `attention_step`, or None."""
    if request.device != "cpu":
        return f"torch's fused CPU kernel does not run on {request.device}"
    if request.softcap:
        return "torch's fused kernel has no softcap"
    return None if request.equal_widths else "torch's fused kernel wants value_dim = head_dim"
