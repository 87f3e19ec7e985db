"""`causal_conv1d` as a sum of shifted inputs, some tokens at a time so that temporaries stay in cache."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.kernels.causal_conv1d.final import final_state
from fusiontree.kernels.causal_conv1d.op import CONV, ConvInputs
from fusiontree.kernels.common.documents import accumulation_dtype, silence_padding

ELEMENTS = 2**18
"""The most elements of a temporary: a megabyte in float32."""
Masks = Bool[Tensor, "taps batch tokens"]


def _spans(
    values: Float[Tensor, "batch time channels"], mask: Bool[Tensor, "taps batch time"] | None
) -> list[tuple[slice, Masks | None]]:
    """Some tokens at a time, each time with its part of the mask, or with None where every tap reads its own document,
    as it mostly does. Other devices than CPUs are not waited for to know that."""
    batch, time, channels = values.shape
    size = max(1, ELEMENTS // max(1, batch * channels))
    spans = [slice(start, min(start + size, time)) for start in range(0, time, size)]
    if mask is None or not spans:
        return [(span, None) for span in spans]
    parts = [mask[..., span] for span in spans]
    if mask.device.type != "cpu":
        return list(zip(spans, parts, strict=True))
    whole = torch.stack([part.all() for part in parts]).tolist()
    return [(span, None if free else part) for span, part, free in zip(spans, parts, whole, strict=True)]


def _seen(
    values: Float[Tensor, "batch tokens channels"], mask: Masks | None, tap: int
) -> Float[Tensor, "batch tokens channels"]:
    """Zeros where the input that `tap` reads is of another document; the last tap reads the token itself."""
    if mask is None or tap == len(mask) - 1:
        return values
    return torch.where(mask[tap, ..., None], values, 0.0)


class _Shifted(torch.autograd.Function):
    """Sums in the accumulation dtype; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, extended: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(extended, weight, bias, mask)
        taps, dtype = weight.mT.to(accumulation_dtype(extended.dtype)), accumulation_dtype(extended.dtype)
        y = torch.empty_like(extended[:, len(taps) - 1 :], memory_format=torch.contiguous_format)
        for span, seen in _spans(y, mask):
            total = bias.to(dtype)
            for tap, factor in enumerate(taps):
                inputs = extended[:, span.start + tap : span.stop + tap].to(dtype)
                total = torch.addcmul(total, _seen(inputs, seen, tap), factor)
            y[:, span] = total
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        extended, weight, bias, mask = ctx.saved_tensors
        dtype = accumulation_dtype(extended.dtype)
        taps, grad_taps = weight.mT.to(dtype), torch.zeros_like(weight.mT, dtype=dtype)
        grad_extended = torch.zeros_like(extended, dtype=dtype)
        for span, seen in _spans(grad, mask):
            arriving = grad[:, span].to(dtype)
            for tap, factor in enumerate(taps):
                read = slice(span.start + tap, span.stop + tap)
                part = _seen(arriving, seen, tap)
                grad_extended[:, read].addcmul_(part, factor)
                grad_taps[tap] += (part * extended[:, read]).sum((0, 1))
        grad_bias = grad.sum((0, 1), dtype=dtype)
        return grad_extended.to(extended.dtype), grad_taps.mT.to(weight.dtype), grad_bias.to(bias.dtype), None


def _fusible(extended: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The sum without blocks, which a compiler fuses into one loop."""
    dtype, time = accumulation_dtype(extended.dtype), extended.shape[1] - weight.shape[1] + 1
    parts = [
        _seen(extended[:, tap : tap + time].to(dtype), mask, tap) * factor
        for tap, factor in enumerate(weight.mT.to(dtype))
    ]
    return sum(parts, start=bias.to(dtype)).to(extended.dtype)


def _convolve(extended: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return _fusible(extended, weight, bias, mask)
    return _Shifted.apply(extended, weight, bias, mask)


@CONV.backend("shifted", priority=10)
def shifted(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """Sums shifted inputs over the taps, masked where a shift crosses a document boundary."""
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
