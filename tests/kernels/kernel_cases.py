"""Random inputs, random documents, and the comparison that every kernel test makes."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from fusiontree.kernels import Op
from fusiontree.testing.operators import (
    TOLERANCE,
    random_segments,
)


class Draw:
    """Random tensors in float64 that are exact in `dtype`, so that only arithmetic differs."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype).double()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).float().double()

    def integer(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.generator))

    def segments(self, time: int) -> Tensor:
        """See `random_segments`."""
        return random_segments(time, self.integer(1000))


def leaves(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [tensor.to(dtype, copy=True).requires_grad_() for tensor, dtype in zip(tensors, dtypes, strict=True)]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float64, what: str = "") -> None:
    assert got.shape == want.shape, (what, got.shape, want.shape)
    assert torch.isfinite(got).all(), f"{what} is not finite"
    if want.numel():
        error = _error(got.double() - want.double(), want.double(), dtype)
        assert error <= TOLERANCE[dtype], f"{what}: error {error:.3g}"


def _error(difference: Tensor, want: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest one; in bfloat16, where rounding an output is half a percent of its largest, the root mean square
    (one rounding is 1.1e-3)."""
    if dtype == torch.bfloat16:
        return difference.norm() / want.norm().clamp(min=math.sqrt(want.numel()) / 1e3)
    return difference.abs().max() / want.abs().max().clamp(min=1)


def assert_all_close(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype, what: str) -> None:
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_close(one, other, dtype, f"{what}, {place}")


def at_real(values: Tensor, segments: Tensor | None) -> Tensor:
    return values if segments is None else values[segments >= 0]


def serving(op: Op[Any], request: Hashable) -> list[str]:
    return [choice.backend for choice in op.explain(request) if choice.refusal is None]


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes, inside custom operators too."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        custom = OPDEFS.get(func._schema.name)
        if custom is None:
            result = func(*args, **(kwargs or {}))
        else:  # torch would show the whole operator and nothing of what it does
            with self:
                result = custom._init_fn(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def saved_elements(output: Tensor) -> int:
    """How much the custom Function that made `output` keeps for backward."""
    function: Any = output.grad_fn
    while not hasattr(function, "saved_tensors"):
        function = function.next_functions[0][0]
    return sum(tensor.numel() for tensor in function.saved_tensors if tensor is not None)
