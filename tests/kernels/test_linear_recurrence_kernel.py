import pytest
import torch
from kernel_cases import Draw, LargestTensor, assert_all_close, at_real, leaves, saved_elements, serving
from torch import Tensor

from fusiontree.kernels.common import tiling
from fusiontree.kernels.common.tiling import TilingLimits
from fusiontree.kernels.linear_recurrence import (
    LINEAR_RECURRENCE,
    LinearRecurrenceRequest,
    linear_recurrence,
)
from fusiontree.testing.operators import gradients

ROWS, CHANNELS = 6, 7
BACKENDS = serving(LINEAR_RECURRENCE, LinearRecurrenceRequest("cpu", torch.float64, segments=True))
CUTS = {
    "many blocks of one chunk": TilingLimits(32 * CHANNELS, whole=512, chunk=64),
    "two rows at once": TilingLimits(2 * 40 * CHANNELS, whole=64, chunk=64),
    "chunks side by side": TilingLimits(6 * 40 * CHANNELS, whole=8, chunk=5),
}


@pytest.fixture(params=[*BACKENDS, *CUTS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that serves, and `two_level` under other limits than the usual ones, which make one block."""
    if request.param not in CUTS:
        return request.param
    monkeypatch.setitem(tiling.LIMITS, "cpu", CUTS[request.param])
    return "two_level"


def draw_inputs(time: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Some of what is kept is all or nothing."""
    draw = Draw(time, dtype)
    x, a = draw.normal(ROWS, time, CHANNELS), draw.uniform(ROWS, time, CHANNELS)
    a[..., 0], a[..., 1] = 1.0, 0.0
    return [x, a, draw.normal(ROWS, CHANNELS)]


def run(inputs: list[Tensor], segments: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    x, a, state = inputs
    y, end = linear_recurrence(x, a, initial_state=state, segments=segments, backend=backend)
    return at_real(y, segments), end


def unrolled(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Every state as a sum over all tokens before it, each times a product of its own: no recurrence."""
    x, a, state = inputs
    parts = []
    for i in range(x.shape[1]):
        added = sum(x[:, j] * a[:, j + 1 : i + 1].prod(1) for j in range(i + 1))
        parts.append(added + state * a[:, : i + 1].prod(1))
    return torch.stack(parts, 1), parts[-1]


def test_is_the_unrolled_sum(backend: str) -> None:
    inputs = draw_inputs(23)
    assert_all_close(run(inputs, None, backend), unrolled(inputs), torch.float64, backend)


@pytest.mark.parametrize("kept", [1 - 1e-7, 1e-30, 1e-3])
def test_far_products_of_what_is_kept_stay_exact_and_finite(backend: str, kept: float) -> None:
    x, a, state = draw_inputs(330)
    inputs = [x, torch.where(a < 0.5, a, kept), state]
    rounded = leaves(inputs, [torch.float32] * 3)
    exact = leaves([tensor.detach().double() for tensor in rounded], [torch.float64] * 3)
    got, want = run(rounded, None, backend), run(exact, None, "reference")
    assert_all_close(got, want, torch.float32, backend)
    assert_all_close(gradients(got, rounded), gradients(want, exact), torch.float32, backend)


def saved(time: int) -> int:
    """Runs one narrow sequence forward and backward; what was kept in between."""
    with LargestTensor() as largest:
        inputs = leaves([torch.ones(1, time, 8), 0.5 * torch.ones(1, time, 8)], [torch.float32] * 2)
        y, _ = linear_recurrence(*inputs, backend="two_level")
        kept = saved_elements(y)
        y.sum().backward()
    assert largest.elements <= 8 * time
    return kept


def test_two_level_is_linear_in_time_and_keeps_the_decays_and_its_output() -> None:
    assert saved(65536) <= 2 * 65536 * 8 + 8
