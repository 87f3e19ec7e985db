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
from torch.utils.flop_counter import FlopCounterMode

from fusiontree.kernels.ssd import SSD, SSDRequest, ssd, ssd_step

ROWS, HEADS, WIDTH, STATE = 6, 4, 3, 5
REQUEST = SSDRequest("cpu", torch.float64, segments=True, gradients=True, even=False)
BACKENDS = serving(SSD, REQUEST)


def draw_inputs(time: int, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = Draw(time, dtype)
    return [
        draw.normal(ROWS, time, HEADS, WIDTH),
        draw.uniform(ROWS, time, HEADS),
        -2 * draw.uniform(HEADS),
        draw.normal(ROWS, time, groups, STATE),
        draw.normal(ROWS, time, groups, STATE),
        draw.normal(ROWS, HEADS, WIDTH, STATE),
    ]


def run(inputs: list[Tensor], segments: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    y, final = ssd(*inputs[:5], initial_state=inputs[5], segments=segments, backend=backend)
    return at_real(y, segments), final


def quadratic(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The dual form with the whole time x time matrix of decays: no recurrence, no chunks."""
    x, dt, A, B, C, state = inputs
    share = HEADS // B.shape[2]
    B, C = B.repeat_interleave(share, 2), C.repeat_interleave(share, 2)
    log = (dt * A).cumsum(1)
    decay = torch.exp(log[:, :, None] - log[:, None])
    causal = torch.ones(x.shape[1], x.shape[1]).tril()[None, :, :, None]
    scores = torch.einsum("bihn,bjhn->bijh", C, B) * decay * causal
    y = torch.einsum("bijh,bjh,bjhp->bihp", scores, dt, x)
    y = y + torch.einsum("bihn,bhpn,bih->bihp", C, state, log.exp())
    added = torch.einsum("bjh,bjh,bjhp,bjhn->bhpn", torch.exp(log[:, -1:] - log), dt, x, B)
    return y, added + state * log[:, -1].exp()[..., None, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_is_the_dual_form(backend: str, groups: int) -> None:
    inputs = draw_inputs(9, groups)
    assert_all_close(run(inputs, None, backend), quadratic(inputs), torch.float64, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
def test_backends_agree_with_the_reference(time: int, packed: bool, dtype: torch.dtype) -> None:
    groups = 1 + time % 2
    draws, segments = draw_inputs(time, groups, dtype), Draw(time).segments(time) if packed else None
    wide = torch.promote_types(dtype, torch.float32)
    exact = leaves(draws, [torch.float64] * 6)
    want = run(exact, segments, "reference")
    want_grads = gradients(want, exact)
    for backend in serving(SSD, REQUEST._replace(dtype=dtype, segments=packed)):
        rounded = leaves(draws, [dtype, wide, wide, dtype, dtype, wide])
        got = run(rounded, segments, backend)
        assert (got[0].dtype, got[1].dtype) == (dtype, wide)
        assert_all_close(got, want, dtype, backend)
        assert_all_close(gradients(got, rounded), want_grads, dtype, f"gradients of {backend}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    draw = Draw(0)
    shapes = ((2, 5, 2, 2), (2, 5, 2), (2,), (2, 5, 1, 2), (2, 5, 1, 2), (2, 2, 2, 2))
    inputs = [draw.normal(*shape) for shape in shapes]
    inputs[1], inputs[2] = inputs[1].abs() + 0.1, -inputs[2].abs()
    segments = torch.tensor([[0, 0, 1, 1, -1], [1, 1, 3, 3, 3]])
    assert torch.autograd.gradcheck(
        lambda *args: run(list(args), segments, backend), leaves(inputs, [torch.float64] * 6)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_are_the_documents_alone(backend: str) -> None:
    time = 150
    x, dt, A, B, C, state = draw_inputs(time)
    segments = Draw(5).segments(time)
    y, final = ssd(x, dt, A, B, C, initial_state=state, segments=segments, backend=backend)
    for row in range(ROWS):
        last = state[row]
        for number, span in documents(segments[row]):
            one = (slice(row, row + 1), span)
            start = state[row : row + 1] if number == 0 else None
            alone, after = ssd(x[one], dt[one], A, B[one], C[one], initial_state=start, backend=backend)
            assert_close(y[one], alone, what=f"row {row}, document {number}")
            last = after[0]
        assert_close(final[row], last, what=f"final state of row {row}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("starts", [(64,), (256,), (128, 192), (255, 256, 257), (1, 63, 127, 320)])
def test_documents_may_start_at_the_edges_of_chunks(backend: str, starts: tuple[int, ...]) -> None:
    inputs, segments = draw_inputs(330), segments_from(starts, 330, ROWS)
    assert_all_close(run(inputs, segments, backend), run(inputs, segments, "reference"), torch.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(1,), (64,), (7, 70, 71), (129,)])
def test_a_split_sequence_is_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    inputs, segments = draw_inputs(130), Draw(3).segments(130)
    whole, whole_state = ssd(*inputs[:5], initial_state=inputs[5], segments=segments, backend=backend)
    state, parts = inputs[5], []
    for start, stop in zip((0, *cuts), (*cuts, 130), strict=True):
        x, dt, B, C = (inputs[place][:, start:stop] for place in (0, 1, 3, 4))
        own = continued(segments, start)[:, : stop - start] if start else segments[:, :stop]
        y, state = ssd(x, dt, inputs[2], B, C, initial_state=state, segments=own, backend=backend)
        parts.append(y)
    assert_close(at_real(torch.cat(parts, 1), segments), at_real(whole, segments))
    assert_close(state, whole_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing_and_gets_no_gradient(backend: str) -> None:
    draws, segments = draw_inputs(70), Draw(8).segments(70)
    inputs = leaves(draws, [torch.float64] * 6)
    y, final = ssd(*inputs[:5], initial_state=inputs[5], segments=segments, backend=backend)
    grads = gradients((y, final), inputs)
    assert torch.isfinite(y).all()
    assert torch.equal(final[4], inputs[5][4])
    for place in (0, 1, 3, 4):
        assert not grads[place][segments < 0].any()
        disturbed = list(draws)
        disturbed[place] = draws[place].clone()
        disturbed[place][segments < 0] = 9.0
        assert_all_close(run(disturbed, segments, backend), (at_real(y, segments), final), torch.float64, backend)


def test_step_by_step_is_the_whole_and_updates_in_place() -> None:
    x, dt, A, B, C, state = draw_inputs(20)
    want, want_state = ssd(x, dt, A, B, C, initial_state=state, backend="reference")
    running = state.clone()
    for t in range(20):
        y, returned = ssd_step(running, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        assert returned is running
        assert_close(y, want[:, t], what=f"token {t}")
    assert_close(running, want_state)


def test_extreme_decays_stay_finite() -> None:
    inputs = draw_inputs(130)
    inputs[1] = inputs[1] * 1000
    assert_all_close(run(inputs, None, "chunked"), run(inputs, None, "reference"), torch.float64, "decays")
    rounded = leaves(inputs, [torch.float32] * 6)
    assert all(torch.isfinite(grad).all() for grad in gradients(run(rounded, None, "chunked"), rounded))


def test_reference_flops_are_the_closed_form() -> None:
    inputs = draw_inputs(11)
    with FlopCounterMode(display=False) as counter:
        run(inputs, None, "reference")
    assert counter.get_total_flops() == ROWS * 11 * 4 * HEADS * WIDTH * STATE


def saved(time: int) -> int:
    """Runs one narrow sequence forward and backward; what was kept in between."""
    shapes = ((1, time, 1, 4), (1, time, 1), (1,), (1, time, 1, 4), (1, time, 1, 4))
    with LargestTensor() as largest:
        y, _ = ssd(*leaves([-torch.ones(shape) for shape in shapes], [torch.float32] * 5), backend="chunked")
        kept = saved_elements(y)
        y.sum().backward()
    assert largest.elements <= 64 * time
    return kept


def test_chunked_is_linear_in_time() -> None:
    assert saved(65536) <= 2.01 * saved(32768)
