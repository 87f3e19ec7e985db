from functools import cache

import pytest
import torch
from kernel_cases import (
    LENGTHS,
    Draw,
    LargestTensor,
    assert_all_close,
    assert_close,
    at_real,
    continued,
    documents,
    gradients,
    leaves,
    saved_elements,
    segments_from,
    serving,
)
from torch import Tensor

from fusiontree.kernels.common import tiling
from fusiontree.kernels.common.tiling import TilingLimits
from fusiontree.kernels.linear_recurrence import (
    LINEAR_RECURRENCE,
    LinearRecurrenceRequest,
    linear_recurrence,
    linear_recurrence_step,
)

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


@cache
def truth(time: int, packed: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Inputs, segments, and what the reference makes of them: both results and all gradients."""
    draws = draw_inputs(time, dtype)
    segments = Draw(time).segments(time) if packed else None
    exact = leaves(draws, [torch.float64] * 3)
    results = run(exact, segments, "reference")
    return draws, segments, [*(result.detach() for result in results), *gradients(results, exact)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
def test_backends_agree_with_the_reference(backend: str, time: int, packed: bool, dtype: torch.dtype) -> None:
    draws, segments, want = truth(time, packed, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rounded = leaves(draws, [dtype, wide, wide])
    got = run(rounded, segments, backend)
    assert (got[0].dtype, got[1].dtype) == (dtype, wide)
    assert_all_close([*got, *gradients(got, rounded)], want, dtype, backend)


def test_gradcheck(backend: str) -> None:
    draw = Draw(0)
    inputs = [draw.normal(2, 5, 4), draw.uniform(2, 5, 4), draw.normal(2, 4)]
    segments = torch.tensor([[0, 0, 1, 1, -1], [1, 1, 3, 3, 3]])
    exact = leaves(inputs, [torch.float64] * 3)
    assert torch.autograd.gradcheck(lambda *args: run(list(args), segments, backend), exact)


def test_packed_documents_are_the_documents_alone(backend: str) -> None:
    time = 150
    x, a, state = draw_inputs(time)
    segments = Draw(5).segments(time)
    y, final = linear_recurrence(x, a, initial_state=state, segments=segments, backend=backend)
    for row in range(ROWS):
        last = state[row]
        for number, span in documents(segments[row]):
            one = (slice(row, row + 1), span)
            start = state[row : row + 1] if number == 0 else None
            alone, after = linear_recurrence(x[one], a[one], initial_state=start, backend=backend)
            assert_close(y[one], alone, what=f"row {row}, document {number}")
            last = after[0]
        assert_close(final[row], last, what=f"final state of row {row}")


@pytest.mark.parametrize("starts", [(64,), (5, 40, 80), (255, 256, 257), (1, 63, 127, 320)])
def test_documents_may_start_at_the_edges_of_chunks(backend: str, starts: tuple[int, ...]) -> None:
    inputs, segments = draw_inputs(330), segments_from(starts, 330, ROWS)
    assert_all_close(run(inputs, segments, backend), run(inputs, segments, "reference"), torch.float64, backend)


@pytest.mark.parametrize("cuts", [(1,), (64,), (7, 70, 71), (129,)])
def test_a_split_sequence_is_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    (x, a, state), segments = draw_inputs(130), Draw(3).segments(130)
    whole, whole_state = linear_recurrence(x, a, initial_state=state, segments=segments, backend=backend)
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, 130), strict=True):
        own = continued(segments, start)[:, : stop - start] if start else segments[:, :stop]
        here = slice(start, stop)
        y, state = linear_recurrence(x[:, here], a[:, here], initial_state=state, segments=own, backend=backend)
        parts.append(y)
    assert_close(at_real(torch.cat(parts, 1), segments), at_real(whole, segments))
    assert_close(state, whole_state)


def test_padding_changes_nothing_and_gets_no_gradient(backend: str) -> None:
    draws, segments = draw_inputs(70), Draw(8).segments(70)
    inputs = leaves(draws, [torch.float64] * 3)
    x, a, state = inputs
    y, final = linear_recurrence(x, a, initial_state=state, segments=segments, backend=backend)
    grads = gradients((y, final), inputs)
    assert torch.isfinite(y).all()
    assert torch.equal(final[4], state[4])
    for place in (0, 1):
        assert not grads[place][segments < 0].any()
        disturbed = list(draws)
        disturbed[place] = draws[place].clone()
        disturbed[place][segments < 0] = 9.0
        assert_all_close(run(disturbed, segments, backend), (at_real(y, segments), final), torch.float64, backend)


@pytest.mark.parametrize("kept", [1 - 1e-7, 1e-30, 1e-3])
def test_far_products_of_what_is_kept_stay_exact_and_finite(backend: str, kept: float) -> None:
    x, a, state = draw_inputs(330)
    inputs = [x, torch.where(a < 0.5, a, kept), state]
    rounded = leaves(inputs, [torch.float32] * 3)
    exact = leaves([tensor.detach().double() for tensor in rounded], [torch.float64] * 3)
    got, want = run(rounded, None, backend), run(exact, None, "reference")
    assert_all_close(got, want, torch.float32, backend)
    assert_all_close(gradients(got, rounded), gradients(want, exact), torch.float32, backend)


def test_step_by_step_is_the_whole_and_updates_in_place() -> None:
    x, a, state = draw_inputs(300)
    want, want_state = linear_recurrence(x, a, initial_state=state)
    running, found = state.clone(), []
    for t in range(300):
        y, returned = linear_recurrence_step(running, x[:, t], a[:, t])
        assert returned is running
        found.append(y)
    assert_close(torch.stack(found, 1), want)
    assert_close(running, want_state)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows(backend: str, rows: int) -> None:
    inputs = [tensor[:rows] for tensor in draw_inputs(9)]
    assert_all_close(run(inputs, None, backend), run(inputs, None, "reference"), torch.float64, backend)


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


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_model_calls_it_as_one_operator(packed: bool) -> None:
    draws, segments = draw_inputs(150), Draw(1).segments(150) if packed else None
    plain, compiled = leaves(draws, [torch.float32] * 3), leaves(draws, [torch.float32] * 3)

    def scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return run(list(inputs), None if segments is None else segments.clamp(min=0), "auto")

    torch._dynamo.reset()
    want, got = scan(*plain), torch.compile(scan, backend="aot_eager", fullgraph=True)(*compiled)
    assert_all_close(got, want, torch.float32, "compiled")
    assert_all_close(gradients(got, compiled), gradients(want, plain), torch.float32, "gradients, compiled")
