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
    serving,
)
from torch import Tensor
from torch.nn.functional import conv1d
from torch.utils.flop_counter import FlopCounterMode

from fusiontree.kernels.causal_conv1d import CONV, ConvRequest, causal_conv1d

ROWS, CHANNELS = 6, 3
REQUEST = ConvRequest("cpu", torch.float64, segments=True, taps=4, eights=False)
BACKENDS = serving(CONV, REQUEST)
TAPS = (1, 2, 4)


def draw_inputs(time: int, taps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias, initial state."""
    draw = Draw(time, dtype)
    shapes = ((ROWS, time, CHANNELS), (CHANNELS, taps), (CHANNELS,), (ROWS, taps - 1, CHANNELS))
    return [draw.normal(*shape) for shape in shapes]


def run(inputs: list[Tensor], segments: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    x, weight, bias, state = inputs
    y, final = causal_conv1d(x, weight, bias, initial_state=state, segments=segments, backend=backend)
    return at_real(y, segments), final


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_leaves_the_state(backend: str) -> None:
    x, weight, bias, state = draw_inputs(1, 4)
    y, final = run([x[:, :0], weight, bias, state], None, backend)
    assert y.shape == (ROWS, 0, CHANNELS)
    assert torch.equal(final, state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", TAPS)
def test_is_torch_conv1d(backend: str, taps: int) -> None:
    x, weight, bias, state = draw_inputs(7, taps)
    extended = torch.cat([state, x], 1)
    want = conv1d(extended.mT, weight[:, None], bias, groups=CHANNELS).mT
    y, final = run([x, weight, bias, state], None, backend)
    assert_close(y, want)
    assert torch.equal(final, extended[:, 7:])
    assert_close(causal_conv1d(x, weight, initial_state=state, backend=backend)[0], want - bias, what="no bias")
    assert_close(causal_conv1d(x, weight, bias, backend=backend)[0][:, taps - 1 :], want[:, taps - 1 :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
def test_backends_agree_with_the_reference(time: int, packed: bool, dtype: torch.dtype) -> None:
    draws, segments = draw_inputs(time, TAPS[time % 3], dtype), Draw(time).segments(time) if packed else None
    exact = leaves(draws, [torch.float64] * 4)
    want = run(exact, segments, "reference")
    want_grads = gradients(want, exact)
    for backend in serving(CONV, REQUEST._replace(dtype=dtype, segments=packed)):
        rounded = leaves(draws, [dtype] * 4)
        got = run(rounded, segments, backend)
        assert {one.dtype for one in got} == {dtype}
        assert_all_close(got, want, dtype, backend)
        assert_all_close(gradients(got, rounded), want_grads, dtype, f"gradients of {backend}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", TAPS)
def test_gradcheck(backend: str, taps: int) -> None:
    inputs = leaves(
        [tensor[:2] if tensor.ndim == 3 else tensor for tensor in draw_inputs(5, taps)], [torch.float64] * 4
    )
    segments = torch.tensor([[0, 0, 1, 1, -1], [1, 1, 3, 3, 3]])
    assert torch.autograd.gradcheck(lambda *args: run(list(args), segments, backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", TAPS)
def test_packed_documents_are_the_documents_alone(backend: str, taps: int) -> None:
    x, weight, bias, state = draw_inputs(40, taps)
    segments = Draw(4).segments(40)
    y, final = causal_conv1d(x, weight, bias, initial_state=state, segments=segments, backend=backend)
    for row in range(ROWS):
        last = state[row]
        for number, span in documents(segments[row]):
            start = state[row : row + 1] if number == 0 else None
            alone, after = causal_conv1d(x[row : row + 1, span], weight, bias, initial_state=start, backend=backend)
            assert_close(y[row, span], alone[0], what=f"row {row}, document {number}")
            last = after[0]
        assert torch.equal(final[row], last), f"final state of row {row}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(1,), (1, 2, 3, 4), (17,), (31, 32)])
def test_a_split_sequence_is_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    x, weight, bias, state = draw_inputs(33, 4)
    segments = Draw(2).segments(33)
    whole, whole_state = causal_conv1d(x, weight, bias, initial_state=state, segments=segments, backend=backend)
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, 33), strict=True):
        own = continued(segments, start)[:, : stop - start] if start else segments[:, :stop]
        part = x[:, start:stop]
        y, state = causal_conv1d(part, weight, bias, initial_state=state, segments=own, backend=backend)
        parts.append(y)
    assert_close(at_real(torch.cat(parts, 1), segments), at_real(whole, segments))
    assert torch.equal(state, whole_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing_and_gets_no_gradient(backend: str) -> None:
    draws, segments = draw_inputs(20, 4), Draw(8).segments(20)
    inputs = leaves(draws, [torch.float64] * 4)
    y, final = causal_conv1d(*inputs[:3], initial_state=inputs[3], segments=segments, backend=backend)
    assert torch.isfinite(y).all()
    assert torch.equal(final[4], inputs[3][4])
    assert not gradients((y, final), inputs)[0][segments < 0].any()
    draws[0][segments < 0] = 9.0
    assert_all_close(run(draws, segments, backend), (at_real(y, segments), final), torch.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_do_not_cross_documents(backend: str) -> None:
    x, weight, bias, state = draw_inputs(9, 4)
    x[:, 4] = torch.inf
    segments = torch.tensor([[0] * 5 + [1] * 4]).expand(ROWS, -1)
    assert torch.isfinite(run([x, weight, bias, state], segments, backend)[0].reshape(ROWS, 9, -1)[:, 5:]).all()


def test_reference_flops_are_the_closed_form() -> None:
    with FlopCounterMode(display=False) as counter:
        run(draw_inputs(11, 4), None, "reference")
    assert counter.get_total_flops() == ROWS * 11 * 2 * 4 * CHANNELS


def test_shifted_is_linear_in_time() -> None:
    inputs = leaves([torch.ones(1, 65536, 4), torch.ones(4, 4)], [torch.float32] * 2)
    with LargestTensor() as largest:
        y, _ = causal_conv1d(*inputs, backend="shifted")
        assert saved_elements(y) <= 5 * 65536
        y.sum().backward()
    assert largest.elements <= 5 * 65536
