"""One token at a time: the operators that decode, against the operators of whole sequences."""

import pytest
import torch
from kernel_cases import Draw, assert_close, serving

from fusiontree.kernels import UnsupportedError
from fusiontree.kernels.attention import ATTENTION_STEP, AlibiBias, StepInputs, attention, attention_step

HEADS, KV_HEADS, WIDTH, SCALE = 6, 2, 8, 0.3
SLOPES = (0.013, 0.5, 1e-3, 0.11, 0.0, 2.0)


def draw_step(filled, slots, dtype=torch.float64, value_dim=WIDTH):
    draw, rows = Draw(slots, dtype), len(filled)
    q, keys = draw.normal(rows, HEADS, WIDTH), draw.normal(rows, KV_HEADS, slots, WIDTH)
    return q, keys, draw.normal(rows, KV_HEADS, slots, value_dim), torch.tensor(filled)


def rounded(inputs, dtype):
    return *(tensor.to(dtype) for tensor in inputs[:3]), inputs[3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("value_dim", [WIDTH, 5])
@pytest.mark.parametrize("filled", [[1], [1, 2, 33, 300], [300, 300], [129, 7, 64]])
def test_every_backend_is_the_reference(dtype, softcap, value_dim, filled) -> None:
    inputs = draw_step(filled, 300, dtype, value_dim)
    want = attention_step(*inputs, scale=SCALE, softcap=softcap, backend="reference")
    given = rounded(inputs, dtype)
    backends = serving(ATTENTION_STEP, StepInputs(*given, SCALE, softcap).request)
    assert {"reference", "product"} <= set(backends)
    assert ("flash_cpu" in backends) == (softcap is None and value_dim == WIDTH)
    for backend in backends:
        got = attention_step(*given, scale=SCALE, softcap=softcap, backend=backend)
        assert_close(got, want, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("filled", [[1, 2, 33, 300], [300, 300]])
def test_falling_scores_are_the_reference(dtype, softcap, filled) -> None:
    inputs = draw_step(filled, 300, dtype)
    distance = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(row)) for row in filled])
    options = {"scale": SCALE, "softcap": softcap, "alibi": AlibiBias(SLOPES, distance)}
    want = attention_step(*inputs, backend="reference", **options)
    given = rounded(inputs, dtype)
    for backend in serving(ATTENTION_STEP, StepInputs(*given, **options).request):
        assert_close(attention_step(*given, backend=backend, **options), want, dtype, backend)


@pytest.mark.parametrize("window", [1, 2, 7, 40])
@pytest.mark.parametrize("backend", ["reference", "product", "flash_cpu"])
def test_a_ring_falls_as_attention_does(window: int, backend: str) -> None:
    draw, time = Draw(window), 40
    q, k, v = (draw.normal(2, time, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    want = attention(q, k, v, window=window, scale=SCALE, slopes=SLOPES, backend="reference")
    keys, values = torch.zeros(2, 2, KV_HEADS, window, WIDTH).double().unbind()
    for t in range(time):
        keys[:, :, t % window], values[:, :, t % window] = k[:, t], v[:, t]
        alibi = AlibiBias(SLOPES, ((t - torch.arange(window)) % window).expand(2, -1))
        filled = torch.full((2,), min(t + 1, window))
        got = attention_step(q[:, t], keys, values, filled, scale=SCALE, alibi=alibi, backend=backend)
        assert_close(got, want[:, t], what=f"{t}")


@pytest.mark.parametrize("window", [1, 2, 7, 40])
def test_a_ring_is_the_window(window: int) -> None:
    """The slots of a ring, written in turn, give what `attention` gives with a window as large."""
    draw, time = Draw(window), 40
    q, k, v = (
        draw.normal(2, time, HEADS, WIDTH),
        draw.normal(2, time, KV_HEADS, WIDTH),
        draw.normal(2, time, KV_HEADS, 5),
    )
    want = attention(q, k, v, window=window, scale=SCALE, backend="reference")
    keys, values = torch.zeros(2, KV_HEADS, window, WIDTH).double(), torch.zeros(2, KV_HEADS, window, 5).double()
    for t in range(time):
        keys[:, :, t % window], values[:, :, t % window] = k[:, t], v[:, t]
        filled = torch.full((2,), min(t + 1, window))
        assert_close(attention_step(q[:, t], keys, values, filled, scale=SCALE), want[:, t], what=f"{t}")


@pytest.mark.parametrize("backend", ["product", "flash_cpu"])
def test_what_stands_in_empty_slots_does_not_matter(backend: str) -> None:
    q, keys, values, filled = draw_step([3, 9], 12)
    want = attention_step(q, keys, values, filled, scale=SCALE, backend=backend)
    empty = (torch.arange(12) >= filled[:, None])[:, None, :, None]
    keys, values = keys.masked_fill(empty, 1e3), values.masked_fill(empty, 1e3)
    assert_close(attention_step(q, keys, values, filled, scale=SCALE, backend=backend), want)


def test_a_refusal_says_why() -> None:
    with pytest.raises(UnsupportedError, match="softcap"):
        attention_step(*draw_step([2], 3), scale=SCALE, softcap=1.0, backend="flash_cpu")
