"""The adapters to Triton kernels with the real kernels, on a CPU: `make triton` runs this under TRITON_INTERPRET=1.

Triton's interpreter runs a kernel as Python. Prints the errors against the float64 references, and fails where one
is too large. bfloat16 is left out: the interpreter of Triton 3.6.0 multiplies it wrongly.
"""

import contextlib
import types
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from kernel_cases import Draw, assert_all_close, at_real
from torch import Tensor

from fusiontree.kernels import Op
from fusiontree.kernels.attention import ATTENTION, AttentionInputs
from fusiontree.kernels.attention import fla as fla_attention
from fusiontree.kernels.causal_conv1d import CONV, ConvInputs
from fusiontree.kernels.causal_conv1d import fla as fla_conv
from fusiontree.kernels.ssd import SSD, SSDInputs, mamba_ssm
from fusiontree.kernels.ssd import fla as fla_scan
from fusiontree.testing.operators import TOLERANCE, gradients

TOLERANCE[torch.float16] = 3e-3


class Place(int):
    """A number that a kernel may convert: in the interpreter those of a `range` are Python's."""

    def to(self, dtype: Any) -> int:
        return self


def no_gpu() -> None:
    """What the libraries ask of a GPU, answered without one; kernels have one configuration, and are not tuned."""
    from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]

    start = Autotuner.__init__

    def first_only(self: Any, fn: Any, names: Any, configs: list[Any], *others: Any, **options: Any) -> None:
        start(self, fn, names, configs[:1], *others, **options)

    Autotuner.__init__ = first_only
    cuda: Any = torch.cuda
    cuda.device = lambda index: contextlib.nullcontext()
    cuda.get_device_properties = lambda index: types.SimpleNamespace(multi_processor_count=2)
    import_module("fla.ops.common.chunk_h").range = lambda *ends: map(Place, range(*ends))
    mamba_ssm.CHUNK = 32


def check_signatures() -> None:
    """The stand-ins of the other tests take what the libraries take."""
    stand_ins = import_module("stand_ins")
    for real, name in [
        (mamba_ssm.load(), "mamba_chunk_scan_combined"),
        (fla_scan.load(), "chunk_simple_gla"),
        (fla_conv.load(), "fla_causal_conv1d"),
        (fla_attention.load(), "parallel_attn"),
    ]:
        told = [
            [(one.name, one.kind, one.default) for one in signature(takes).parameters.values()]
            for takes in (real, getattr(stand_ins, name))
        ]
        assert told[0] == told[1], f"{name} is declared otherwise"


def check(
    op: Op[Any],
    backend: str,
    inputs: Callable[..., Any],
    tensors: list[Tensor | None],
    dtypes: list[torch.dtype],
    segments: Tensor | None,
) -> None:
    """Compare results and gradients with the reference's."""
    found = []
    for name, exact in ((backend, False), ("reference", True)):
        mine = [
            None if one is None else one.to(torch.float64 if exact else dtype, copy=True).requires_grad_()
            for one, dtype in zip(tensors, dtypes, strict=True)
        ]
        results = op.backends[name].run(inputs(*mine, segments))
        results = [results] if isinstance(results, Tensor) else list(results)
        results[0] = at_real(results[0], segments)
        found.append([*results, *gradients(results, [one for one in mine if one is not None])])
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(*found, strict=True)]
    kind = "one document a row" if segments is None else f"documents {tuple(segments.shape)}"
    print(f"{op.name:14} {backend:10} {str(dtypes[0])[6:]:8} {kind:20} largest error {max(errors):.1e}", flush=True)
    assert_all_close(found[0], found[1], dtypes[0], backend)


EDGES = torch.tensor([[0] * 32 + [1] * 31, [1] * 33 + [2] * 30, [0] * 31 + [4] * 20 + [-1] * 12])
"""Documents that start at the edges of chunks, before them and behind them; a row that continues nothing."""


def check_scans() -> None:
    for segments in (None, Draw(70).segments(70), EDGES):
        for groups, dtype in ((1, torch.float32), (2, torch.float16)):
            rows, time = (2, 45) if segments is None else segments.shape
            draw, wide = Draw(groups, dtype), torch.float32
            tensors = [
                draw.normal(rows, time, 2, 16),
                draw.uniform(rows, time, 2),
                -2 * draw.uniform(2),
                draw.normal(rows, time, groups, 16),
                draw.normal(rows, time, groups, 16),
                draw.normal(rows, 2, 16, 16) if groups == 2 or segments is not None else None,
            ]
            for backend in ("mamba_ssm", "fla"):
                check(SSD, backend, SSDInputs, tensors, [dtype, wide, wide, dtype, dtype, wide], segments)


def check_convolutions() -> None:
    for segments in (None, Draw(70).segments(70), Draw(3).segments(3)):
        for taps in (2, 4):
            rows, time = (2, 70) if segments is None else segments.shape
            draw = Draw(taps)
            tensors = [draw.normal(rows, time, 8), draw.normal(8, taps), draw.normal(8), draw.normal(rows, taps - 1, 8)]
            check(CONV, "fla", ConvInputs, tensors, [torch.float32] * 4, segments)


def check_attention() -> None:
    for time, segments in ((33, None), (150, Draw(150).segments(150)[[0, 3, 5]])):
        for window in (1, 7, time, None):
            draw = Draw(time)
            tensors = [draw.normal(2 if segments is None else 3, time, heads, 16) for heads in (4, 2, 2)]

            def inputs(q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, width: Any = window) -> AttentionInputs:
                return AttentionInputs(q, k, v, width, 0.4, None, own)

            check(ATTENTION, "fla", inputs, tensors, [torch.float32] * 3, segments)


if __name__ == "__main__":
    no_gpu()
    check_signatures()
    check_scans()
    check_convolutions()
    check_attention()
