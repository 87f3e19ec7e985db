"""Random inputs, random documents, and the comparison that every kernel test makes."""

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from fusiontree.kernels import Op

LENGTHS = (1, 2, 3, 63, 64, 65, 130, 257)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 8e-3}


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
        """Six rows: one document, starting with segment 0, starting with 1, short, all padding, ragged."""
        rows = torch.stack([self._row(time) for _ in range(6)])
        rows[0] = 0
        rows[1] -= rows[1, 0].clone()
        rows[2] += 1 - rows[2, 0]
        rows[3, (time + 1) // 2 :] = -1
        rows[4] = -1
        rows[5, time - self.integer(time) :] = -1
        return rows

    def _row(self, time: int) -> Tensor:
        starts = torch.rand(time, generator=self.generator) < 4 / (time + 4)
        return starts.long().cumsum(0) * (1 + self.integer(2))


def segments_from(starts: Sequence[int], time: int, rows: int) -> Tensor:
    """The same documents in each row, a new one at each of `starts`."""
    begins = torch.zeros(time, dtype=torch.long)
    begins[list(starts)] = 1
    return begins.cumsum(0).expand(rows, -1)


def leaves(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [tensor.to(dtype, copy=True).requires_grad_() for tensor, dtype in zip(tensors, dtypes, strict=True)]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of one fixed random functional of the outputs."""
    draw = Draw(99)
    loss = sum((draw.normal(*output.shape) * output.double()).sum() for output in outputs)
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, inputs))


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


def documents(row: Tensor) -> Iterator[tuple[int, slice]]:
    """Each segment number of a row, and where it is."""
    for number in row[row >= 0].unique().tolist():
        (places,) = torch.nonzero(row == number, as_tuple=True)
        yield number, slice(int(places[0]), int(places[-1]) + 1)


def continued(segments: Tensor, cut: int) -> Tensor:
    """The segments from `cut` on, numbered as a call that continues the last document before it."""
    before = segments[:, :cut].amax(1, keepdim=True).clamp(min=0)
    rest = segments[:, cut:]
    return torch.where(rest < 0, rest, rest - before)


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
