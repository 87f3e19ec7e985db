"""`causal_conv1d` as a sum of shifted inputs, some tokens at a time so that temporaries stay in cache."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.kernels.conv.final import final_state
from fusiontree.kernels.conv.op import CONV, ConvInputs
from fusiontree.kernels.documents import silence_padding, wide

TOKENS = 128


def _spans(time: int) -> Iterator[slice]:
    for start in range(0, time, TOKENS):
        yield slice(start, min(start + TOKENS, time))


def _seen(
    values: Float[Tensor, "batch tokens channels"],
    mask: Bool[Tensor, "taps batch time"] | None,
    tap: int,
    span: slice,
) -> Float[Tensor, "batch tokens channels"]:
    """Zeros where the input that `tap` reads is of another document."""
    return values if mask is None else torch.where(mask[tap, :, span, None], values, 0.0)


class _Shifted(torch.autograd.Function):
    """Sums in the wide dtype; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, extended: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(extended, weight, bias, mask)
        taps, dtype = weight.mT.to(wide(extended.dtype)), wide(extended.dtype)
        y = torch.empty_like(extended[:, len(taps) - 1 :], memory_format=torch.contiguous_format)
        for span in _spans(y.shape[1]):
            total = bias.to(dtype)
            for tap, factor in enumerate(taps):
                inputs = extended[:, span.start + tap : span.stop + tap].to(dtype)
                total = torch.addcmul(total, _seen(inputs, mask, tap, span), factor)
            y[:, span] = total
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        extended, weight, bias, mask = ctx.saved_tensors
        dtype = wide(extended.dtype)
        taps, grad_taps = weight.mT.to(dtype), torch.zeros_like(weight.mT, dtype=dtype)
        grad_extended = torch.zeros_like(extended, dtype=dtype)
        for span in _spans(grad.shape[1]):
            arriving = grad[:, span].to(dtype)
            for tap, factor in enumerate(taps):
                read = slice(span.start + tap, span.stop + tap)
                part = _seen(arriving, mask, tap, span)
                grad_extended[:, read].addcmul_(part, factor)
                grad_taps[tap] += (part * extended[:, read]).sum((0, 1))
        grad_bias = grad.sum((0, 1), dtype=dtype)
        return grad_extended.to(extended.dtype), grad_taps.mT.to(weight.dtype), grad_bias.to(bias.dtype), None


def _fusible(extended: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The same sum without blocks, for a compiler that makes one loop of it."""
    dtype, time = wide(extended.dtype), extended.shape[1] - weight.shape[1] + 1
    everything = slice(0, time)
    parts = [
        _seen(extended[:, tap : tap + time].to(dtype), mask, tap, everything) * factor
        for tap, factor in enumerate(weight.mT.to(dtype))
    ]
    return sum(parts, start=bias.to(dtype)).to(extended.dtype)


def _convolve(extended: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return _fusible(extended, weight, bias, mask)
    return _Shifted.apply(extended, weight, bias, mask)


@CONV.backend("shifted", priority=10)
def shifted(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """Sum over taps of the inputs so many tokens back, where those belong to the same document."""
    x, weight, bias, _, segments = inputs
    time, history = x.shape[1], inputs.history()
    extended = torch.cat([history, x], dim=1)
    bias = x.new_zeros(x.shape[2]) if bias is None else bias
    if segments is None:
        return _convolve(extended, weight, bias, None), final_state(inputs)
    owners = torch.cat([segments.new_zeros(history.shape[:2]), segments], dim=1)
    mask = torch.stack([owners[:, tap : tap + time] == segments for tap in range(weight.shape[1])])
    y = _convolve(extended, weight, bias, mask)
    return silence_padding(y, segments), final_state(inputs)
