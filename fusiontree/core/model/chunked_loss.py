"""Cross entropy of features without all logits in memory: the head and the loss, some tokens at a time.

The gradients of a chunk are made with its loss, so that nothing is computed twice and no logits are kept (Liger
Kernel, arXiv 2410.10989, section 3.2). Logits of 8,192 tokens and a vocabulary of 128,000 would take 4 GB in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.core.contracts.modules import accumulation_dtype

Head = Callable[..., Float[Tensor, "tokens vocab"]]
FEATURES = 0
"""The index of the features among the inputs of a head."""
NO_LABEL = -100
"""The label of positions without a target; torch's default."""
SMALL = 2**24
"""So many logits at a time, or about as many as there are features."""


def cross_entropy(
    head: Head,
    labels: Int[Tensor, "tokens"],
    features: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, "vocab"] | None = None,
) -> Float[Tensor, ""]:
    """The sum over all labels of -log p, in nats, in float32 or better; -100 is no label.

    Differentiable once in features, weight and bias, of which `head(features, weight, bias)` makes the logits.
    """
    inputs = (features, weight) if bias is None else (features, weight, bias)
    if not torch.is_grad_enabled():
        return _measure(head, labels, inputs, [])[0]
    return _Chunked.apply(head, labels, *inputs)


class _Chunked(torch.autograd.Function):
    """The sum; its gradients are there before they are asked for."""

    @staticmethod
    def forward(ctx: Any, head: Head, labels: Tensor, *inputs: Tensor) -> Tensor:
        ctx.wanted = [index for index, wanted in enumerate(ctx.needs_input_grad[2:]) if wanted]
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        total, gradients = _measure(head, labels, inputs, ctx.wanted)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.dtypes)
        for index, gradient in zip(ctx.wanted, ctx.saved_tensors, strict=True):
            found[index] = (gradient * grad).to(ctx.dtypes[index])  # rounded once, behind the mean
        return None, None, *found


def _measure(
    head: Head, labels: Tensor, inputs: tuple[Tensor, ...], wanted: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """The sum over all chunks, and its gradients for the inputs at the wanted indices."""
    features, weight = inputs[:2]
    total = torch.zeros((), dtype=accumulation_dtype(features.dtype), device=features.device)
    sums = [_zeros(index, inputs[index]) for index in wanted]
    size = max(1, max(SMALL, features.numel()) // len(weight))
    for start in range(0, len(features), size):
        span = slice(start, start + size)
        loss, gradients = _one(head, labels[span], (features[span], *inputs[1:]), wanted)
        total += loss
        for index, whole, part in zip(wanted, sums, gradients, strict=True):
            (whole[span] if index == FEATURES else whole).add_(part)
    return total, sums


def _zeros(index: int, like: Tensor) -> Tensor:
    """A gradient of 0; wide where chunks are summed."""
    return torch.zeros_like(like, dtype=like.dtype if index == FEATURES else accumulation_dtype(like.dtype))


def _one(
    head: Head, labels: Tensor, inputs: tuple[Tensor, ...], wanted: Sequence[int]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum of one chunk, and its gradients."""
    leaves = [tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
    with torch.set_grad_enabled(bool(wanted)):
        logits = head(*leaves)
        loss = F.cross_entropy(
            logits.to(accumulation_dtype(logits.dtype)), labels, ignore_index=NO_LABEL, reduction="sum"
        )
    gradients = torch.autograd.grad(loss, [leaves[index] for index in wanted]) if wanted else ()
    return loss.detach(), gradients
