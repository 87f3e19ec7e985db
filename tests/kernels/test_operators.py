"""Custom operators keep torch's rules: shapes, strides, aliases, gradients, what the compiler is told."""

import pytest
import torch
from kernel_cases import Draw

import fusiontree.kernels  # noqa: F401  (registers them)

TIME, HEADS, WIDTH, STATE = 70, 2, 4, 3
WHAT = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPS = torch.ops.fusiontree


def tensors(*shapes, learn=True):
    draw = Draw(0)
    return [draw.normal(*shape).requires_grad_(learn) for shape in shapes]


@pytest.mark.parametrize("packed", [False, True])
def test_ssd_chunked(packed):
    x, dt, B, C = tensors((1, TIME, HEADS, WIDTH), (1, TIME, HEADS), (1, TIME, 1, STATE), (1, TIME, 1, STATE))
    A, state = tensors((HEADS,), (1, 1, STATE, HEADS * WIDTH))
    segments = torch.arange(TIME)[None] // 30 if packed else None
    torch.library.opcheck(OPS.ssd_chunked, (x, dt.abs(), -A.abs(), B, C, state, segments, True, False), test_utils=WHAT)


@pytest.mark.parametrize("packed", [False, True])
def test_gated_delta_chunked(packed):
    q, k, v = tensors((1, TIME, 1, STATE), (1, TIME, 1, STATE), (1, TIME, HEADS, WIDTH))
    g, beta, state = tensors((1, TIME, HEADS), (1, TIME, HEADS), (1, 1, HEADS, STATE, WIDTH))
    segments = torch.arange(TIME)[None] // 30 if packed else None
    inputs = (q, k / 9, v, -g.abs(), beta, state, segments, True)
    torch.library.opcheck(OPS.gated_delta_chunked, inputs, test_utils=WHAT)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", ["product", "flash_cpu"])
def test_attention_blocked(window, kernel):
    q, k, v = tensors((1, TIME, HEADS, WIDTH), (1, TIME, 1, WIDTH), (1, TIME, 1, WIDTH))
    segments = torch.arange(TIME)[None] // 30
    torch.library.opcheck(
        OPS.attention_blocked, (q, k, v, segments, None, window, kernel, 0.5, None, 2), test_utils=WHAT
    )
