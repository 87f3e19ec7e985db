import pytest
import torch
from kernel_cases import Draw, LargestTensor, assert_close, at_real, leaves, saved_elements, serving
from torch import Tensor
from torch.nn.functional import conv1d

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_do_not_cross_documents(backend: str) -> None:
    x, weight, bias, state = draw_inputs(9, 4)
    x[:, 4] = torch.inf
    segments = torch.tensor([[0] * 5 + [1] * 4]).expand(ROWS, -1)
    assert torch.isfinite(run([x, weight, bias, state], segments, backend)[0].reshape(ROWS, 9, -1)[:, 5:]).all()


def test_shifted_is_linear_in_time() -> None:
    inputs = leaves([torch.ones(1, 65536, 4), torch.ones(4, 4)], [torch.float32] * 2)
    with LargestTensor() as largest:
        y, _ = causal_conv1d(*inputs, backend="shifted")
        assert saved_elements(y) <= 5 * 65536
        y.sum().backward()
    assert largest.elements <= 5 * 65536
