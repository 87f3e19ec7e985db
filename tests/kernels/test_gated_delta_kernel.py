from functools import cache

import pytest
import torch
import torch.nn.functional as F
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

from fusiontree.kernels.common import chunks
from fusiontree.kernels.gated_delta import GATED_DELTA, GatedDeltaRequest, gated_delta, gated_delta_step

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


@cache
def truth(
    time: int, decay: Decay, packed: bool, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Inputs, segments, and what the reference makes of them: both results and all gradients."""
    draws = draw_inputs(time, decay, 1 + time % 2, dtype)
    segments = Draw(time).segments(time) if packed else None
    exact = leaves(draws, [torch.float64] * 6)
    results = run(exact, segments, "reference")
    return draws, segments, [*(result.detach() for result in results), *gradients(results, exact)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
def test_backends_agree_with_the_reference(
    backend: str, decay: Decay, time: int, packed: bool, dtype: torch.dtype
) -> None:
    draws, segments, want = truth(time, decay, packed, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rounded = leaves(draws, [dtype, dtype, dtype, wide, wide, wide])
    got = run(rounded, segments, backend)
    assert (got[0].dtype, got[1].dtype) == (dtype, wide)
    assert_all_close([*got, *gradients(got, rounded)], want, dtype, backend)


def test_gradcheck(backend: str, decay: Decay) -> None:
    draw, widths = Draw(0), (2,) * len(decay)
    shapes = ((2, 5, 1, 2), (2, 5, 1, 2), (2, 5, 2, 2), (2, 5, 2, *widths), (2, 5, 2), (2, 2, 2, 2))
    inputs = [draw.normal(*shape) for shape in shapes]
    inputs[3] = -inputs[3].abs()
    segments = torch.tensor([[0, 0, 1, 1, -1], [1, 1, 3, 3, 3]])
    assert torch.autograd.gradcheck(
        lambda *args: run(list(args), segments, backend), leaves(inputs, [torch.float64] * 6)
    )


def test_packed_documents_are_the_documents_alone(backend: str, decay: Decay) -> None:
    *tokens, state = draw_inputs(150, decay)
    segments = Draw(5).segments(150)
    y, final = gated_delta(*tokens, initial_state=state, segments=segments, backend=backend)
    for row in range(ROWS):
        last = state[row]
        for number, span in documents(segments[row]):
            own = [tensor[row : row + 1, span] for tensor in tokens]
            start = state[row : row + 1] if number == 0 else None
            alone, after = gated_delta(*own, initial_state=start, backend=backend)
            assert_close(y[row : row + 1, span], alone, what=f"row {row}, document {number}")
            last = after[0]
        assert_close(final[row], last, what=f"final state of row {row}")


@pytest.mark.parametrize("starts", [(64,), (256,), (128, 192), (255, 256, 257), (1, 63, 127, 320)])
def test_documents_may_start_at_the_edges_of_chunks(backend: str, decay: Decay, starts: tuple[int, ...]) -> None:
    inputs, segments = draw_inputs(330, decay), segments_from(starts, 330, ROWS)
    assert_all_close(run(inputs, segments, backend), run(inputs, segments, "reference"), torch.float64, backend)


def test_nothing_of_a_document_is_left_in_the_next(backend: str, decay: Decay) -> None:
    inputs, segments = draw_inputs(90, decay), segments_from((41,), 90, ROWS)
    inputs[3] = torch.zeros_like(inputs[3])  # nothing ever decays
    y, final = run(inputs, segments, backend)
    inputs[2][:, :41], inputs[5] = 1e30, inputs[5] * 1e30
    disturbed, disturbed_final = run(inputs, segments, backend)
    kept = slice(41, None)
    assert torch.equal(y.view(ROWS, 90, -1)[:, kept], disturbed.view(ROWS, 90, -1)[:, kept])
    assert torch.equal(final, disturbed_final)


@pytest.mark.parametrize("cuts", [(1,), (64,), (7, 70, 71), (129,)])
def test_a_split_sequence_is_the_whole(backend: str, decay: Decay, cuts: tuple[int, ...]) -> None:
    (*tokens, state), segments = draw_inputs(130, decay), Draw(3).segments(130)
    whole, whole_state = gated_delta(*tokens, initial_state=state, segments=segments, backend=backend)
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, 130), strict=True):
        own = continued(segments, start)[:, : stop - start] if start else segments[:, :stop]
        cut = [tensor[:, start:stop] for tensor in tokens]
        y, state = gated_delta(*cut, initial_state=state, segments=own, backend=backend)
        parts.append(y)
    assert_close(at_real(torch.cat(parts, 1), segments), at_real(whole, segments))
    assert_close(state, whole_state)


def test_padding_changes_nothing_and_gets_no_gradient(backend: str, decay: Decay) -> None:
    draws, segments = draw_inputs(70, decay), Draw(8).segments(70)
    inputs = leaves(draws, [torch.float64] * 6)
    y, final = gated_delta(*inputs[:5], initial_state=inputs[5], segments=segments, backend=backend)
    grads = gradients((y, final), inputs)
    assert torch.isfinite(y).all()
    assert torch.equal(final[4], inputs[5][4])
    for place in range(5):
        assert not grads[place][segments < 0].any()
        disturbed = list(draws)
        disturbed[place] = draws[place].clone()
        disturbed[place][segments < 0] = 9.0
        assert_all_close(run(disturbed, segments, backend), (at_real(y, segments), final), torch.float64, backend)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_step_by_step_is_the_whole_and_updates_in_place(decay: Decay, key_heads: int) -> None:
    *tokens, state = draw_inputs(150, decay, key_heads)
    want, want_state = gated_delta(*tokens, initial_state=state)
    running = state.clone()
    for t in range(150):
        y, returned = gated_delta_step(running, *(tensor[:, t] for tensor in tokens))
        assert returned is running
        assert_close(y, want[:, t], what=f"token {t}")
    assert_close(running, want_state)


def test_a_step_takes_what_a_scan_takes(decay: Decay) -> None:
    draws = draw_inputs(1, decay, 1, torch.bfloat16)
    kinds = [*[torch.bfloat16] * 3, *[torch.float32] * 3]
    *tokens, state = (draw.to(kind) for draw, kind in zip(draws, kinds, strict=True))
    want, want_state = gated_delta(*tokens, initial_state=state)
    y, _ = gated_delta_step(state, *(tensor[:, 0] for tensor in tokens))
    assert y.dtype == torch.bfloat16
    assert_close(y, want[:, 0], torch.bfloat16)
    assert_close(state, want_state, torch.float32)


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


def test_reference_flops_are_the_closed_form(decay: Decay) -> None:
    inputs = draw_inputs(11, decay)
    with FlopCounterMode(display=False) as counter:
        run(inputs, None, "reference")
    assert counter.get_total_flops() == ROWS * 11 * 6 * HEADS * KEY * VALUE


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows(backend: str, decay: Decay, rows: int) -> None:
    inputs = [tensor[:rows] for tensor in draw_inputs(9, decay)]
    assert_all_close(run(inputs, None, backend), run(inputs, None, "reference"), torch.float64, backend)


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


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_model_calls_it_as_one_operator(decay: Decay, packed: bool) -> None:
    draws, segments = draw_inputs(150, decay), Draw(1).segments(150) if packed else None
    plain, compiled = leaves(draws, [torch.float32] * 6), leaves(draws, [torch.float32] * 6)

    def scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta(*inputs[:5], initial_state=inputs[5], segments=segments)

    torch._dynamo.reset()
    want, got = scan(*plain), torch.compile(scan, backend="aot_eager", fullgraph=True)(*compiled)
    assert_all_close(got, want, torch.float32, "compiled")
    assert_all_close(gradients(got, compiled), gradients(want, plain), torch.float32, "gradients, compiled")


def test_a_step_can_be_compiled(decay: Decay) -> None:
    *tokens, state = (tensor.double() for tensor in draw_inputs(1, decay))
    inputs, again = [tensor[:, 0] for tensor in tokens], state.clone()
    torch._dynamo.reset()
    want, _ = gated_delta_step(state, *inputs)
    got, _ = torch.compile(gated_delta_step, backend="aot_eager", fullgraph=True)(again, *inputs)
    assert_all_close([got, again], [want, state], torch.float64, "compiled step")


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
