import sys
from functools import cache
from types import ModuleType

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

from fusiontree.kernels.common import packages, tiling
from fusiontree.kernels.common.tiling import TilingLimits
from fusiontree.kernels.registry import serves_all
from fusiontree.kernels.selective_scan import (
    SELECTIVE_SCAN,
    SelectiveScanInputs,
    SelectiveScanRequest,
    mamba_ssm,
    selective_scan,
    selective_scan_step,
)

ROWS, CHANNELS, STATE = 6, 4, 5
ENTRIES = CHANNELS * STATE
REQUEST = SelectiveScanRequest("cpu", torch.float64, segments=True, state=STATE)
ON_GPU = SelectiveScanRequest("cuda", torch.bfloat16, segments=False, state=16)
BACKENDS = serving(SELECTIVE_SCAN, REQUEST)
CUTS = {
    "many blocks of one chunk": TilingLimits(32 * ENTRIES, whole=512, chunk=64),
    "two rows at once": TilingLimits(2 * 40 * ENTRIES, whole=64, chunk=64),
    "chunks side by side": TilingLimits(6 * 40 * ENTRIES, whole=8, chunk=5),
}


@pytest.fixture(params=[*BACKENDS, *CUTS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that serves, and `two_level` under other limits than the usual ones, which make one block."""
    if request.param not in CUTS:
        return request.param
    monkeypatch.setitem(tiling.LIMITS, "cpu", CUTS[request.param])
    return "two_level"


def draw_inputs(time: int, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = Draw(time, dtype)
    return [
        draw.normal(ROWS, time, CHANNELS),
        draw.uniform(ROWS, time, CHANNELS),
        -2 * draw.uniform(CHANNELS, STATE),
        draw.normal(ROWS, time, groups, STATE),
        draw.normal(ROWS, time, groups, STATE),
        draw.normal(ROWS, CHANNELS, STATE),
    ]


def run(inputs: list[Tensor], segments: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    y, final = selective_scan(*inputs[:5], initial_state=inputs[5], segments=segments, backend=backend)
    return at_real(y, segments), final


def unrolled(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Every state as a sum over all tokens before it: no recurrence."""
    x, dt, A, B, C, state = inputs
    share = CHANNELS // B.shape[2]
    B, C = B.repeat_interleave(share, 2), C.repeat_interleave(share, 2)
    log = (dt[..., None] * A).cumsum(1)
    causal = torch.ones(x.shape[1], x.shape[1]).tril()[None, :, :, None, None]
    decay = torch.exp(log[:, :, None] - log[:, None]) * causal
    states = torch.einsum("bijdn,bjd,bjd,bjdn->bidn", decay, dt, x, B) + log.exp() * state[:, None]
    return torch.einsum("bidn,bidn->bid", states, C), states[:, -1]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_is_the_unrolled_sum(backend: str, groups: int) -> None:
    inputs = draw_inputs(9, groups)
    assert_all_close(run(inputs, None, backend), unrolled(inputs), torch.float64, backend)


def test_one_group_needs_no_axis(backend: str) -> None:
    inputs = draw_inputs(9, 1)
    flat = [*inputs[:3], inputs[3][:, :, 0], inputs[4][:, :, 0], inputs[5]]
    assert_all_close(run(flat, None, backend), run(inputs, None, backend), torch.float64, backend)


@cache
def truth(time: int, packed: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Inputs, segments, and what the reference makes of them: both results and all gradients."""
    draws = draw_inputs(time, 1 + time % 2, dtype)
    segments = Draw(time).segments(time) if packed else None
    exact = leaves(draws, [torch.float64] * 6)
    results = run(exact, segments, "reference")
    return draws, segments, [*(result.detach() for result in results), *gradients(results, exact)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
def test_backends_agree_with_the_reference(backend: str, time: int, packed: bool, dtype: torch.dtype) -> None:
    draws, segments, want = truth(time, packed, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rounded = leaves(draws, [dtype, wide, wide, dtype, dtype, wide])
    got = run(rounded, segments, backend)
    assert (got[0].dtype, got[1].dtype) == (dtype, wide)
    assert_all_close([*got, *gradients(got, rounded)], want, dtype, backend)


def test_gradcheck(backend: str) -> None:
    draw = Draw(0)
    shapes = ((2, 5, 4), (2, 5, 4), (4, 2), (2, 5, 2, 2), (2, 5, 2, 2), (2, 4, 2))
    inputs = [draw.normal(*shape) for shape in shapes]
    inputs[1], inputs[2] = inputs[1].abs() + 0.1, -inputs[2].abs()
    segments = torch.tensor([[0, 0, 1, 1, -1], [1, 1, 3, 3, 3]])
    assert torch.autograd.gradcheck(
        lambda *args: run(list(args), segments, backend), leaves(inputs, [torch.float64] * 6)
    )


def test_packed_documents_are_the_documents_alone(backend: str) -> None:
    time = 150
    x, dt, A, B, C, state = draw_inputs(time)
    segments = Draw(5).segments(time)
    y, final = selective_scan(x, dt, A, B, C, initial_state=state, segments=segments, backend=backend)
    for row in range(ROWS):
        last = state[row]
        for number, span in documents(segments[row]):
            one = (slice(row, row + 1), span)
            start = state[row : row + 1] if number == 0 else None
            alone, after = selective_scan(x[one], dt[one], A, B[one], C[one], initial_state=start, backend=backend)
            assert_close(y[one], alone, what=f"row {row}, document {number}")
            last = after[0]
        assert_close(final[row], last, what=f"final state of row {row}")


@pytest.mark.parametrize("starts", [(64,), (32, 256), (5, 40, 80), (255, 256, 257), (1, 63, 127, 320)])
def test_documents_may_start_at_the_edges_of_chunks(backend: str, starts: tuple[int, ...]) -> None:
    inputs, segments = draw_inputs(330), segments_from(starts, 330, ROWS)
    assert_all_close(run(inputs, segments, backend), run(inputs, segments, "reference"), torch.float64, backend)


def test_nothing_of_a_document_is_left_in_the_next(backend: str) -> None:
    inputs, segments = draw_inputs(90), segments_from((41,), 90, ROWS)
    inputs[2] = torch.zeros_like(inputs[2])  # nothing ever decays
    y, final = run(inputs, segments, backend)
    inputs[0][:, :41], inputs[5] = 1e30, inputs[5] * 1e30
    disturbed, disturbed_final = run(inputs, segments, backend)
    kept = slice(41, None)
    assert torch.equal(y.view(ROWS, 90, -1)[:, kept], disturbed.view(ROWS, 90, -1)[:, kept])
    assert torch.equal(final, disturbed_final)


@pytest.mark.parametrize("cuts", [(1,), (64,), (7, 70, 71), (129,)])
def test_a_split_sequence_is_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    inputs, segments = draw_inputs(130), Draw(3).segments(130)
    whole, whole_state = selective_scan(*inputs[:5], initial_state=inputs[5], segments=segments, backend=backend)
    state, parts = inputs[5], []
    for start, stop in zip((0, *cuts), (*cuts, 130), strict=True):
        x, dt, B, C = (inputs[place][:, start:stop] for place in (0, 1, 3, 4))
        own = continued(segments, start)[:, : stop - start] if start else segments[:, :stop]
        y, state = selective_scan(x, dt, inputs[2], B, C, initial_state=state, segments=own, backend=backend)
        parts.append(y)
    assert_close(at_real(torch.cat(parts, 1), segments), at_real(whole, segments))
    assert_close(state, whole_state)


def test_padding_changes_nothing_and_gets_no_gradient(backend: str) -> None:
    draws, segments = draw_inputs(70), Draw(8).segments(70)
    inputs = leaves(draws, [torch.float64] * 6)
    y, final = selective_scan(*inputs[:5], initial_state=inputs[5], segments=segments, backend=backend)
    grads = gradients((y, final), inputs)
    assert torch.isfinite(y).all()
    assert torch.equal(final[4], inputs[5][4])
    for place in (0, 1, 3, 4):
        assert not grads[place][segments < 0].any()
        disturbed = list(draws)
        disturbed[place] = draws[place].clone()
        disturbed[place][segments < 0] = 9.0
        assert_all_close(run(disturbed, segments, backend), (at_real(y, segments), final), torch.float64, backend)


@pytest.mark.parametrize("groups", [1, 2])
def test_step_by_step_is_the_whole_and_updates_in_place(groups: int) -> None:
    x, dt, A, B, C, state = draw_inputs(300, groups)
    want, want_state = selective_scan(x, dt, A, B, C, initial_state=state)
    running = state.clone()
    for t in range(300):
        y, returned = selective_scan_step(running, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        assert returned is running
        assert_close(y, want[:, t], what=f"token {t}")
    assert_close(running, want_state)


def test_a_step_takes_what_a_scan_takes() -> None:
    draws = draw_inputs(1, 1, torch.bfloat16)
    x, dt, A, B, C, state = (
        draw.to(kind) for draw, kind in zip(draws, [torch.bfloat16, *[torch.float32] * 5], strict=True)
    )
    want, want_state = selective_scan(x, dt, A, B.bfloat16(), C.bfloat16(), initial_state=state)
    y, _ = selective_scan_step(state, x[:, 0], dt[:, 0], A, B[:, 0, 0].bfloat16(), C[:, 0, 0].bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close(y, want[:, 0], torch.bfloat16)
    assert_close(state, want_state, torch.float32)


@pytest.mark.parametrize("scale", [1e-12, 1e3, 1e30])
def test_extreme_steps_stay_exact_and_finite(backend: str, scale: float) -> None:
    inputs = draw_inputs(130)
    inputs[1], inputs[0] = inputs[1] * scale, inputs[0] / scale
    assert_all_close(run(inputs, None, backend), run(inputs, None, "reference"), torch.float64, backend)
    rounded = leaves(inputs, [torch.float32] * 6)
    got = run(rounded, None, backend)
    assert_all_close(got, run(inputs, None, "reference"), torch.float32, backend)
    assert all(torch.isfinite(grad).all() for grad in gradients(got, rounded))


def test_reference_flops_are_the_closed_form() -> None:
    inputs = draw_inputs(11)
    with FlopCounterMode(display=False) as counter:
        run(inputs, None, "reference")
    assert counter.get_total_flops() == ROWS * 11 * 4 * CHANNELS * STATE


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows(backend: str, rows: int) -> None:
    inputs = [tensor if tensor.shape == (CHANNELS, STATE) else tensor[:rows] for tensor in draw_inputs(9)]
    assert_all_close(run(inputs, None, backend), run(inputs, None, "reference"), torch.float64, backend)


def saved(time: int) -> int:
    """Runs one narrow sequence forward and backward; what was kept in between."""
    shapes = ((1, time, 8), (1, time, 8), (8, 4), (1, time, 1, 4), (1, time, 1, 4))
    with LargestTensor() as largest:
        inputs = leaves([-torch.ones(shape) for shape in shapes], [torch.float32] * 5)
        y, _ = selective_scan(*inputs, backend="two_level")
        kept = saved_elements(y)
        y.sum().backward()
    assert largest.elements <= 1.1 * 8 * time  # as large as x, where all states are four times as much
    return kept


def test_two_level_is_linear_in_time_and_holds_one_block_of_states() -> None:
    assert saved(131072) <= 2.01 * saved(65536)


def assert_same_compiled(draws: list[Tensor], segments: Tensor | None, backend: str) -> None:
    """One graph gives what the plain call gives; who else could serve is asked while it is made."""
    plain, compiled = leaves(draws, [torch.float32] * 6), leaves(draws, [torch.float32] * 6)

    def scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x = inputs[0] * len(SELECTIVE_SCAN.explain(ON_GPU))
        return selective_scan(x, *inputs[1:5], initial_state=inputs[5], segments=segments, backend=backend)

    torch._dynamo.reset()
    want, got = scan(*plain), torch.compile(scan, backend="aot_eager", fullgraph=True)(*compiled)
    assert_all_close(got, want, torch.float32, "compiled")
    assert_all_close(gradients(got, compiled), gradients(want, plain), torch.float32, "gradients, compiled")


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_model_calls_it_as_one_operator(packed: bool) -> None:
    assert_same_compiled(draw_inputs(150), Draw(1).segments(150) if packed else None, "auto")


def test_a_step_can_be_compiled() -> None:
    inputs = [tensor if tensor.ndim == 2 else tensor[:, 0] for tensor in draw_inputs(1)[:5]]
    plain, compiled = draw_inputs(1)[5], draw_inputs(1)[5]
    torch._dynamo.reset()
    want, _ = selective_scan_step(plain, *inputs)
    got, _ = torch.compile(selective_scan_step, backend="aot_eager", fullgraph=True)(compiled, *inputs)
    assert_all_close([got, compiled], [want, plain], torch.float64, "compiled step")


def standing_in(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The signature, the checks and the meaning of mamba-ssm 2.3.2's selective_scan_fn for what is passed here."""
    assert u.dtype == delta.dtype == A.dtype == B.dtype == C.dtype == torch.float32
    batch, dim, time = u.shape
    groups, entries = B.shape[1:3]
    assert delta.shape == u.shape
    assert A.shape == (dim, entries)
    assert B.shape == C.shape == (batch, groups, entries, time)
    assert all(tensor.stride(-1) == 1 for tensor in (u, delta, B, C))
    assert D is z is delta_bias is None and not delta_softplus and not return_last_state
    B, C = (values.repeat_interleave(dim // groups, 1) for values in (B, C))
    state, outputs = torch.zeros(batch, dim, entries), []
    for t in range(time):
        state = torch.exp(delta[:, :, t, None] * A) * state + (delta * u)[:, :, t, None] * B[..., t]
        outputs.append((state * C[..., t]).sum(-1))
    return torch.stack(outputs, -1)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm, as far as the adapter sees it."""
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    modules = {name: ModuleType(name) for name in names}
    modules[names[2]].selective_scan_fn = standing_in  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    mamba_ssm.load.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", [1, 3, 65])
def test_adapter_of_mamba_ssm(time: int, dtype: torch.dtype) -> None:
    draws, _, want = truth(time, False, dtype)
    rounded = leaves(draws, [dtype, torch.float32, torch.float32, dtype, dtype, torch.float32])
    got = mamba_ssm.mamba_ssm(SelectiveScanInputs(*rounded, None))
    assert (got[0].dtype, got[1].dtype) == (dtype, torch.float32)
    assert_all_close([*got, *gradients(got, rounded)], want, dtype, "mamba_ssm")


@pytest.mark.usefixtures("library")
def test_a_compiled_model_calls_the_adapter_as_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    unrefusing = SELECTIVE_SCAN.backends["mamba_ssm"]._replace(supports=serves_all)
    monkeypatch.setitem(SELECTIVE_SCAN.backends, "mamba_ssm", unrefusing)
    assert_same_compiled(draw_inputs(5), None, "mamba_ssm")


def test_adapter_of_mamba_ssm_says_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mamba_ssm._refusal(ON_GPU._replace(device="cpu")) == "only on CUDA devices"
    monkeypatch.setattr(packages, "installed", {}.get)
    assert mamba_ssm._refusal(ON_GPU) == "mamba-ssm is not installed"
    monkeypatch.setattr(packages, "installed", {"mamba-ssm": (2, 3, 2, 1)}.get)
    monkeypatch.setattr(mamba_ssm, "EXTENSION", "no_such_extension")
    assert mamba_ssm._refusal(ON_GPU) == "mamba-ssm is installed without its extension no_such_extension"
    monkeypatch.setattr(mamba_ssm, "EXTENSION", "torch")
    assert mamba_ssm._refusal(ON_GPU) is None
    assert mamba_ssm._refusal(ON_GPU._replace(dtype=torch.float64)) == "has no float64"
    assert mamba_ssm._refusal(ON_GPU._replace(segments=True)) == "has no document boundaries"
    assert mamba_ssm._refusal(ON_GPU._replace(state=257)) == "state must be at most 256"


def test_is_what_transformers_computes() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    draws = leaves(draw_inputs(130, 1), [torch.float32] * 6)
    x, dt, A, B, C, _ = draws
    rows = [tensor.flatten(2).mT for tensor in (x, dt, B, C)]
    y, state = modeling.mamba_selective_scan(rows[0], rows[1], A, *rows[2:], return_last_state=True)
    want, got = (y.mT, state), selective_scan(x, dt, A, B, C)
    assert_all_close(got, want, torch.float32, "transformers")
    assert_all_close(gradients(got, draws[:5]), gradients(want, draws[:5]), torch.float32, "gradients, transformers")


def test_a_step_is_what_transformers_computes() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    draws = [tensor.float() for tensor in draw_inputs(1, 1)]
    x, dt, A, B, C = (tensor if tensor.ndim == 2 else tensor.flatten(2)[:, 0] for tensor in draws[:5])
    theirs, ours = draws[5].clone(), draws[5].clone()
    want = modeling.mamba_selective_state_update(theirs, x, dt, A, B, C)
    y, _ = selective_scan_step(ours, x, dt, A, B, C)
    assert_close(y, want, torch.float32)
    assert_close(ours, theirs, torch.float32)
