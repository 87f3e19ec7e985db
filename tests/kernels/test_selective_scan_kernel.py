import sys
from functools import cache
from types import ModuleType

import pytest
import torch
from kernel_cases import Draw, LargestTensor, assert_all_close, assert_close, at_real, leaves, saved_elements, serving
from torch import Tensor

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
from fusiontree.testing.operators import gradients

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


@pytest.mark.parametrize("scale", [1e-12, 1e3, 1e30])
def test_extreme_steps_stay_exact_and_finite(backend: str, scale: float) -> None:
    inputs = draw_inputs(130)
    inputs[1], inputs[0] = inputs[1] * scale, inputs[0] / scale
    assert_all_close(run(inputs, None, backend), run(inputs, None, "reference"), torch.float64, backend)
    rounded = leaves(inputs, [torch.float32] * 6)
    got = run(rounded, None, backend)
    assert_all_close(got, run(inputs, None, "reference"), torch.float32, backend)
    assert all(torch.isfinite(grad).all() for grad in gradients(got, rounded))


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
