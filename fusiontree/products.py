"""Matrix products in half precision on processors that have no units for it.

On such processors a half-precision product takes 5 to 15 times as long as in float32. Products of more than a few
rows are therefore computed in float32, block by block, so that no full copy of weights or activations is made. Sums
over blocks are kept in float32 and rounded once. Products of few rows stay in half precision: their time is the time
to read the weights, which have half as many bytes.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fusiontree import machine
from fusiontree.compiling import constant

ROWS = 4
"""Products of at least this many rows are faster in float32; measured on a processor with AVX2."""
SIDE, BLOCK = 512, 2**18
"""The most rows and the most elements of an operand that are widened at a time: 1 MB in float32."""
HALF = (torch.bfloat16, torch.float16)


@constant
def widens(device: str, dtype: torch.dtype) -> bool:
    """Whether products of tensors of this dtype, on this type of device, are computed in float32."""
    return device == "cpu" and dtype in HALF and not machine.multiplies(dtype)


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply tensors like x: their own, or float32 where float32 is faster."""
    return torch.float32 if widens(x.device.type, x.dtype) else x.dtype


def linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, "outputs"] | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """x W^T + b, like `torch.nn.functional.linear`, but on every processor about as fast as in float32."""
    if torch.compiler.is_compiling():
        return _traced(x, weight, bias)
    if x.numel() >= ROWS * x.shape[-1] and _is_widened(x, weight, bias):
        return _Widened.apply(x, weight, bias, _result_dtype(x))
    return F.linear(x, weight, bias)


def batched(
    x: Float[Tensor, "batch rows inputs"],
    weight: Float[Tensor, "batch inputs outputs"],
    bias: Float[Tensor, "batch outputs"],
) -> Float[Tensor, "batch rows outputs"]:
    """x W + b for each matrix of a batch, computed like `linear`."""
    if x.shape[1] >= ROWS and _is_widened(x, weight, bias):
        return torch.stack([linear(*each) for each in zip(x, weight.mT, bias, strict=True)])
    return torch.baddbmm(bias[:, None], x, weight)


def _is_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch would compute a product in half precision although float32 is faster here. False for operands that
    torch refuses together, and under `torch.func` transforms: torch handles both."""
    dtype, operands = _result_dtype(x), (x, weight) if bias is None else (x, weight, bias)
    if dtype not in HALF or not widens(x.device.type, dtype) or torch._C._are_functorch_transforms_active():
        return False
    if dtype == x.dtype and not torch.is_autocast_enabled(x.device.type):
        return all(each.dtype == dtype for each in operands)
    return all(each.dtype != torch.float64 for each in operands)


def _result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product of x with weights of the same dtype; under autocast, the dtype of autocast."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _traced(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in a form for compilers, which widen inside their loops without a copy. Exports keep `F.linear`."""
    plain = torch.compiler.is_exporting() or x.dtype not in HALF or x.dtype != weight.dtype
    if plain or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if x.numel() == x.shape[-1]:
        return _read_once(x, weight, bias)
    if x.numel() < ROWS * x.shape[-1] or not widens("cpu", x.dtype):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _read_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product with one row as a sum over the weights; compiled, it is twice as fast as torch's product."""
    y = (x.flatten().float() * weight.float()).sum(-1)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


class _Widened(torch.autograd.Function):
    """`linear` in float32, block by block; saves only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            return _product(x.flatten(0, -2), weight, bias, dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients are wanted
            return *_plain_gradients(grad, x, weight, ctx.bias_dtype), None
        grads, rows = grad.flatten(0, -2), x.flatten(0, -2)
        wanted = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            grad_x = _sum_over_outputs(grads, weight, x.dtype).view(x.shape) if wanted[0] else None
            grad_weight = _sum_over_rows(grads, rows, weight.dtype) if wanted[1] else None
        grad_bias = grads.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wanted[2] else None
        return grad_x, grad_weight, grad_bias, None


def _plain_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, the weight and the bias in float32, by differentiable operations."""
    wide = grad.float()
    grad_x = (wide @ weight.float()).to(x.dtype)
    grad_weight = (wide.flatten(0, -2).mT @ x.flatten(0, -2).float()).to(weight.dtype)
    return grad_x, grad_weight, None if bias is None else wide.flatten(0, -2).sum(0).to(bias)


def _spans(matrix: Float[Tensor, "rows columns"]) -> Iterator[slice]:
    """Slices that cover the rows of a matrix in blocks."""
    size = max(1, min(SIDE, BLOCK // max(1, matrix.shape[1])))
    for start in range(0, matrix.shape[0], size):
        yield slice(start, start + size)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    for rows in _spans(x):
        part = x[rows].float()
        for outputs in _spans(weight):
            product = part @ weight[outputs].float().mT
            y[rows, outputs] = product if bias is None else product.add_(bias[outputs])
    return y


def _sum_over_outputs(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Float[Tensor, "rows inputs"]:
    """The gradient of x."""
    found = grad.new_empty(grad.shape[0], weight.shape[1], dtype=dtype)
    for rows in _spans(found):
        total = torch.zeros(found[rows].shape, dtype=torch.float32)
        for outputs in _spans(weight):
            total.addmm_(grad[rows, outputs].float(), weight[outputs].float())
        found[rows] = total
    return found


def _sum_over_rows(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
    """The gradient of the weight."""
    found = grad.new_empty(grad.shape[1], x.shape[1], dtype=dtype)
    for outputs in _spans(found):
        total = torch.zeros(found[outputs].shape, dtype=torch.float32)
        for rows in _spans(x):
            total.addmm_(grad[rows, outputs].float().mT, x[rows].float())
        found[outputs] = total
    return found
