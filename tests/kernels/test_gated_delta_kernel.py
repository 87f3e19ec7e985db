import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Draw, LargestTensor, assert_all_close, at_real, leaves, saved_elements, serving
from torch import Tensor

from fusiontree.kernels.common import chunks
from fusiontree.kernels.gated_delta import GATED_DELTA, GatedDeltaRequest, gated_delta
from fusiontree.testing.operators import gradients

ROWS, HEADS, KEY, VALUE = 6, 4, 5, 3
REQUEST = GatedDeltaRequest("cpu", torch.float64, segments=True)
BACKENDS = serving(GATED_DELTA, REQUEST)


@pytest.fixture(params=[*BACKENDS, "two chunks a step"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend, and `chunked` where a step does not hold the whole sequence."""
    if request.param in BACKENDS:
        return request.param
    monkeypatch.setattr(chunks, "DECAYS_A_STEP", 2 * ROWS * HEADS * chunks.CHUNK**2)
    return "chunked"


Decay = tuple[int, ...]
FORMS: dict[str, Decay] = {"a decay a head": (), "a decay a channel": (KEY,)}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def decay(request: pytest.FixtureRequest) -> Decay:
    """Dimensions of g beside batch, time and heads."""
    return request.param


def draw_inputs(time: int, decay: Decay, key_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Keys of length 1; beta up to 2; decays of channels that are far apart."""
    draw = Draw(time, dtype)
    q, k = (F.normalize(draw.normal(ROWS, time, key_heads, KEY), dim=-1).to(dtype).double() for _ in "qk")
    g, beta = -draw.uniform(ROWS, time, HEADS, *decay), 2 * draw.uniform(ROWS, time, HEADS)
    g = g * 4.0 ** torch.arange(-3, 2) if decay else g
    return [q, k, draw.normal(ROWS, time, HEADS, VALUE), g, beta, draw.normal(ROWS, HEADS, KEY, VALUE)]


def run(inputs: list[Tensor], segments: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    y, final = gated_delta(*inputs[:5], initial_state=inputs[5], segments=segments, backend=backend)
    return at_real(y, segments), final


def multiplied_out(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Every state from the matrices (I - beta k k^T) Diag(a) of the papers' first forms."""
    q, k, v, g, beta, state = inputs
    q, k = (values.repeat_interleave(HEADS // values.shape[2], 2) for values in (q, k))
    outputs = []
    for t in range(q.shape[1]):
        rate = beta[:, t, :, None, None]
        erased = torch.eye(KEY).double() - rate * k[:, t, :, :, None] * k[:, t, :, None]
        kept = torch.diag_embed(g[:, t].exp().reshape(ROWS, HEADS, -1).expand(-1, -1, KEY))
        state = erased @ kept @ state + rate * k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhn,bhnp->bhp", q[:, t], state))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_is_the_product_of_the_paper_s_matrices(backend: str, decay: Decay, key_heads: int) -> None:
    inputs = draw_inputs(9, decay, key_heads)
    assert_all_close(run(inputs, None, backend), multiplied_out(inputs), torch.float64, backend)


@pytest.mark.parametrize("scale", [0.0, 1e3, 1e30])
def test_extreme_decays_stay_finite(backend: str, decay: Decay, scale: float) -> None:
    inputs = draw_inputs(130, decay)
    inputs[3] = inputs[3] * scale
    assert_all_close(run(inputs, None, backend), run(inputs, None, "reference"), torch.float64, backend)
    rounded = leaves(inputs, [torch.float32] * 6)
    assert all(torch.isfinite(grad).all() for grad in gradients(run(rounded, None, backend), rounded))


def test_strong_decays_of_channels_take_no_digits_of_weak_ones(backend: str) -> None:
    """From token to token and channel to channel nearly nothing is lost, or nearly all; sums of logs go to -5000."""
    inputs = draw_inputs(200, (KEY,))
    inputs[3] = torch.where(inputs[3] < inputs[3].median(), -80.0, inputs[3] / 100)
    exact, rounded = (leaves(inputs, [dtype] * 6) for dtype in (torch.float64, torch.float32))
    want, got = run(exact, None, "reference"), run(rounded, None, backend)
    assert_all_close(got, want, torch.float32, backend)
    assert_all_close(gradients(got, rounded), gradients(want, exact), torch.float32, f"gradients, {backend}")


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_that_are_all_the_same_are_no_harder(backend: str, decay: Decay, beta: float) -> None:
    """The system that a chunk solves is then as far from the identity as it can be."""
    inputs = draw_inputs(300, decay)
    inputs[1], inputs[4] = inputs[1][:1, :1].expand_as(inputs[1]), torch.full_like(inputs[4], beta)
    inputs[3] = torch.zeros_like(inputs[3])
    got = run(leaves(inputs, [torch.float32] * 6), None, backend)
    assert_all_close(got, run(inputs, None, "reference"), torch.float32, backend)


def saved(time: int, decay: Decay) -> int:
    """Runs one narrow sequence forward and backward; what was kept in between."""
    shapes = ((1, time, 1, KEY), (1, time, 1, KEY), (1, time, 1, 4), (1, time, 1, *decay), (1, time, 1))
    with LargestTensor() as largest:
        y, _ = gated_delta(*leaves([-torch.ones(shape) / 2 for shape in shapes], [torch.float32] * 5))
        kept = saved_elements(y)
        y.sum().backward()
    assert largest.elements <= 64 * time
    return kept


def test_chunked_is_linear_in_time(decay: Decay) -> None:
    assert saved(65536, decay) <= 2.01 * saved(32768, decay)


THEIRS = {
    "torch_chunk_gated_delta_rule": ("qwen3_next", ()),
    "torch_recurrent_gated_delta_rule": ("qwen3_next", ()),
    "chunk_kimi_delta_attention": ("kimi_linear", (KEY,)),
    "recurrent_kimi_delta_attention": ("kimi_linear", (KEY,)),
}


@pytest.mark.parametrize("function", THEIRS)
def test_is_what_transformers_computes(function: str) -> None:
    name, decay = THEIRS[function]
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    draws = leaves(draw_inputs(130, decay, HEADS), [torch.float32] * 6)
    q, k, v, g, beta, state = draws
    y, end = getattr(modeling, function)(q, k, v, g, beta, initial_state=state, output_final_state=True)
    want, got = (y, end), gated_delta(q * KEY**-0.5, k, v, g, beta, initial_state=state)
    assert_all_close(got, want, torch.float32, "transformers")
    assert_all_close(gradients(got, draws), gradients(want, draws), torch.float32, "gradients, transformers")
