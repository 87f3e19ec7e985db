import pytest
import torch
from kernel_cases import Draw, LargestTensor, assert_all_close, at_real, leaves, saved_elements, serving
from torch import Tensor

from fusiontree.kernels.ssd import SSD, SSDRequest, ssd
from fusiontree.testing.operators import gradients

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


def test_extreme_decays_stay_finite() -> None:
    inputs = draw_inputs(130)
    inputs[1] = inputs[1] * 1000
    assert_all_close(run(inputs, None, "chunked"), run(inputs, None, "reference"), torch.float64, "decays")
    rounded = leaves(inputs, [torch.float32] * 6)
    assert all(torch.isfinite(grad).all() for grad in gradients(run(rounded, None, "chunked"), rounded))


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
