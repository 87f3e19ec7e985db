"""Adapters to libraries of GPU kernels, with plain-torch stand-ins behind the libraries' real signatures."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from kernel_cases import Draw, assert_all_close, assert_close, at_real, leaves
from torch import Tensor

from fusiontree.kernels import OPS, Op
from fusiontree.kernels.attention import (
    ATTENTION,
    AttentionInputs,
    AttentionRequest,
    attention,
    flash_attn,
    flex,
    varlen,
    xformers,
)
from fusiontree.kernels.attention import fla as fla_attention
from fusiontree.kernels.causal_conv1d import CONV, ConvInputs, ConvRequest, causal_conv1d, causal_conv1d_cuda
from fusiontree.kernels.causal_conv1d import fla as fla_conv
from fusiontree.kernels.common import packages
from fusiontree.kernels.registry import serves_all
from fusiontree.kernels.ssd import SSD, SSDInputs, SSDRequest, mamba_ssm, ssd
from fusiontree.kernels.ssd import fla as fla_scan
from fusiontree.testing.operators import gradients

TIME, ROWS = 13, 6
REAL = {"mamba_ssm": mamba_ssm.load.__wrapped__, "varlen": varlen.load.__wrapped__}
FLASH = {
    "flash_attn": stand_ins.flash_attn_2,
    "flash_attn_interface": stand_ins.flash_attn_3,
    "flash_attn.cute": stand_ins.flash_attn_4,
}
SCANS = {
    "mamba_ssm": (mamba_ssm, lambda: stand_ins.mamba_chunk_scan_combined),
    "fla": (fla_scan, lambda: stand_ins.chunk_simple_gla),
}
CONVS = {
    "causal_conv1d": (causal_conv1d_cuda, lambda: stand_ins.causal_conv1d_fn),
    "fla": (fla_conv, lambda: stand_ins.fla_causal_conv1d),
}
ATTENTIONS = {
    "varlen": (varlen, lambda: stand_ins.varlen_attn_2_13),
    "flash_attn": (flash_attn, FLASH.__getitem__),
    "flash_attn_3": (flash_attn, FLASH.__getitem__),
    "flash_attn_4": (flash_attn, FLASH.__getitem__),
    "xformers": (
        xformers,
        lambda: xformers.XformersLibrary(stand_ins.memory_efficient_attention, stand_ins.BlockDiagonalMask),
    ),
    "fla": (fla_attention, lambda: stand_ins.parallel_attn),
}


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapter finds its stand-in."""
    for module, load in [*SCANS.values(), *CONVS.values(), *ATTENTIONS.values()]:
        monkeypatch.setattr(module, "load", load)


@pytest.fixture
def unrefusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend serves everything, CPUs included."""
    for op in OPS.values():
        for name, backend in op.backends.items():
            monkeypatch.setitem(op.backends, name, backend._replace(supports=serves_all))


def rows(packed: bool) -> Tensor | None:
    """Six kinds of rows, or one document a row."""
    return Draw(TIME).segments(TIME) if packed else None


def both(op: Op[Any], inputs: Callable[..., Any], tensors: list[Tensor | None], backend: str) -> Iterator[list[Tensor]]:
    """What a backend gives and what the reference does: results, then gradients."""
    for name in (backend, "reference"):
        mine = [None if one is None else leaves([one], [torch.float64])[0] for one in tensors]
        results = op.backends[name].run(inputs(*mine))
        results = (results,) if isinstance(results, Tensor) else results
        yield [*results, *gradients(results, [one for one in mine if one is not None])]


def scan_tensors(groups: int, state: bool) -> list[Tensor | None]:
    draw, heads, width, size = Draw(groups), 4, 3, 5
    return [
        draw.normal(ROWS, TIME, heads, width),
        draw.uniform(ROWS, TIME, heads),
        -2 * draw.uniform(heads),
        draw.normal(ROWS, TIME, groups, size),
        draw.normal(ROWS, TIME, groups, size),
        draw.normal(ROWS, heads, width, size) if state else None,
    ]


@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("groups", "state"), [(1, False), (2, True), (4, True)])
def test_scans_are_the_reference(backend: str, packed: bool, groups: int, state: bool) -> None:
    segments = rows(packed)
    got, want = both(SSD, lambda *some: SSDInputs(*some, segments), scan_tensors(groups, state), backend)
    assert_all_close(got, want, torch.float64, backend)


@pytest.mark.parametrize("backend", CONVS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("taps", "bias", "state"), [(2, True, True), (3, False, False), (4, False, True)])
def test_convolutions_are_the_reference(backend: str, packed: bool, taps: int, bias: bool, state: bool) -> None:
    draw, segments, channels = Draw(taps), rows(packed), 8
    tensors = [
        draw.normal(ROWS, TIME, channels),
        draw.normal(channels, taps),
        draw.normal(channels) if bias else None,
        draw.normal(ROWS, taps - 1, channels) if state else None,
    ]
    got, want = both(CONV, lambda *some: ConvInputs(*some, segments), tensors, backend)
    assert_all_close(got, want, torch.float64, backend)


@pytest.mark.parametrize("time", [1, 2, 3])
@pytest.mark.parametrize("backend", CONVS)
def test_convolutions_of_fewer_tokens_than_taps(backend: str, time: int) -> None:
    draw = Draw(time)
    tensors = [draw.normal(1, time, 8), draw.normal(8, 4), None, draw.normal(1, 3, 8)]
    for segments in (None, torch.zeros(1, time, dtype=torch.long), torch.arange(time)[None]):
        got, want = both(CONV, lambda *some, own=segments: ConvInputs(*some, own), tensors, backend)
        assert_all_close(got, want, torch.float64, backend)


def test_convolutions_take_slices_of_wider_tensors() -> None:
    x, weight = Draw(0).normal(2, 5, 21)[..., 2:18], Draw(1).normal(16, 4)
    got = CONV.backends["causal_conv1d"].run(ConvInputs(x, weight, None, None, None))
    assert_all_close(got, causal_conv1d(x, weight, backend="reference"), torch.float64, "slices")


def attention_tensors(kv_heads: int = 2) -> list[Tensor | None]:
    draw = Draw(kv_heads)
    return [draw.normal(ROWS, TIME, heads, 8) for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("backend", ATTENTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, TIME, TIME + 1, None])
def test_attention_is_the_reference(backend: str, packed: bool, window: int | None) -> None:
    segments = rows(packed)
    got, want = both(
        ATTENTION,
        lambda *some: AttentionInputs(*some, window, 0.4, None, segments),
        attention_tensors(),
        backend,
    )
    assert_all_close(got, want, torch.float64, backend)


@pytest.mark.parametrize("backend", ATTENTIONS)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_with_grouped_heads(backend: str, kv_heads: int) -> None:
    tensors = attention_tensors(kv_heads)
    got, want = both(ATTENTION, lambda *some: AttentionInputs(*some, 3, 0.4, None, None), tensors, backend)
    assert_all_close(got, want, torch.float64, backend)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_varlen_of_older_torch_repeats_keys(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "load", lambda: stand_ins.varlen_attn_2_11)
    tensors, segments = attention_tensors(kv_heads), rows(packed=True)
    got, want = both(ATTENTION, lambda *some: AttentionInputs(*some, 3, 0.4, None, segments), tensors, "varlen")
    assert_all_close(got, want, torch.float64, "varlen")


@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn_3"])
def test_flash_attention_has_softcap(backend: str) -> None:
    got, want = both(ATTENTION, lambda *some: AttentionInputs(*some, 3, 0.4, 1.5, None), attention_tensors(), backend)
    assert_all_close(got, want, torch.float64, backend)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flash_attention_has_slopes(packed: bool, softcap: float | None) -> None:
    segments, slopes = rows(packed), (0.5, 0.0, 2.0, 0.125)
    got, want = both(
        ATTENTION,
        lambda *some: AttentionInputs(*some, 3, 0.4, softcap, segments, slopes),
        attention_tensors(),
        "flash_attn",
    )
    assert_all_close(got, want, torch.float64, "flash_attn")


@pytest.mark.usefixtures("gpu")
def test_who_has_slopes_on_a_gpu() -> None:
    found = refusals(ATTENTION, cuda_request(ATTENTION)._replace(slopes=True))
    assert {name: found[name] for name in ATTENTIONS} == {
        name: None if name == "flash_attn" else "has no slopes" for name in ATTENTIONS
    }
    assert found["flex"] is found["blocked"] is None


def test_a_batch_of_padding_alone() -> None:
    segments = torch.full((ROWS, TIME), -1)
    for backend in ATTENTIONS:
        got, want = both(
            ATTENTION, lambda *some: AttentionInputs(*some, 3, 0.4, None, segments), attention_tensors(), backend
        )
        assert_all_close(got, want, torch.float64, backend)
    for backend in SCANS:
        got, want = both(SSD, lambda *some: SSDInputs(*some, segments), scan_tensors(2, state=True), backend)
        assert_all_close(got, want, torch.float64, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_those_of_the_reference(dtype: torch.dtype) -> None:
    segments = rows(packed=True)
    x, dt, A, B, C, state = (one.to(dtype) for one in scan_tensors(2, state=True) if one is not None)
    for backend in SCANS:
        y, final = SSD.backends[backend].run(SSDInputs(x, dt, A, B, C, state, segments))
        want, want_final = ssd(x, dt, A, B, C, initial_state=state, segments=segments, backend="reference")
        assert (y.dtype, final.dtype) == (dtype, torch.float32)
        assert_close(at_real(y, segments), at_real(want, segments), dtype, backend)
        assert_close(final, want_final, dtype, backend)
    q, k, v = (one.to(dtype) for one in attention_tensors() if one is not None)
    want = attention(q, k, v, scale=0.4, segments=segments, backend="reference")
    for backend in ATTENTIONS:
        y = ATTENTION.backends[backend].run(AttentionInputs(q, k, v, None, 0.4, None, segments))
        assert y.dtype == dtype
        assert_close(at_real(y, segments), at_real(want, segments), dtype, backend)


def compiled_step(run: Callable[..., Any], tensors: list[Tensor | None]) -> None:
    """A backend inside a compiled function, which must be one graph, gives what it gives outside."""
    torch._dynamo.reset()
    found = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)):
        mine = [None if one is None else leaves([one.sin()], [torch.float64])[0] for one in tensors]
        results = call(*mine)
        found.append([*results, *gradients(results, [one for one in mine if one is not None])])
    assert_all_close(found[1], found[0], torch.float64, "compiled")


@pytest.mark.usefixtures("unrefusing")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_models_call_backends_as_they_are(packed: bool) -> None:
    segments = rows(packed)

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> list[Tensor]:
        once, final = ssd(x * 2, dt, A, B, C, initial_state=state, segments=segments, backend="mamba_ssm")
        twice, _ = ssd(once, dt, A, B, C, segments=segments, backend="fla")
        y, last = causal_conv1d(twice.flatten(2)[..., :8] * 2, B[0, :8, 0, :4], segments=segments, backend="fla")
        return [
            y,
            final,
            last,
            attention(x, B[..., :3], B[..., :3], scale=0.3, window=3, segments=segments, backend="varlen"),
            attention(x, x, x, scale=0.3, slopes=(0.5, 0.1, 0.0, 2.0), segments=segments, backend="flash_attn"),
        ]

    compiled_step(run, scan_tensors(2, state=True))


def cuda_request(op: Op[Any]) -> Any:
    if op is SSD:
        return SSDRequest("cuda", torch.bfloat16, segments=True, gradients=True, even=True)
    if op is CONV:
        return ConvRequest("cuda", torch.bfloat16, segments=True, taps=4, eights=True)
    return AttentionRequest(
        "cuda",
        torch.bfloat16,
        windowed=True,
        softcap=False,
        segments=True,
        past=False,
        prefix=False,
        head_dim=64,
        value_dim=64,
        gradients=True,
    )


ADAPTERS = [
    *((SSD, name) for name in SCANS),
    *((CONV, name) for name in CONVS),
    *((ATTENTION, name) for name in (*ATTENTIONS, "flex")),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """A Hopper GPU beside every package; what is taken out of the dictionary is not installed."""
    names = ("mamba-ssm", "causal-conv1d", "fla-core", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers")
    found: dict[str, tuple[int, ...]] = {name: (99,) for name in (*names, "triton")}
    monkeypatch.setattr(packages, "installed", found.get)
    monkeypatch.setattr(packages, "version", lambda name: "0.1")
    monkeypatch.setattr(fla_scan, "capability", lambda: (9, 0))
    monkeypatch.setattr("fusiontree.kernels.attention.packing.capability", lambda: (9, 0))
    monkeypatch.setattr(varlen, "built", lambda: True)
    monkeypatch.setattr(flex, "compiler", lambda: "cc")
    return found


def refusals(op: Op[Any], request: Any) -> dict[str, str | None]:
    return {choice.backend: choice.refusal for choice in op.explain(request)}


@pytest.mark.parametrize(("op", "backend"), ADAPTERS)
def test_nothing_is_served_on_a_cpu(op: Op[Any], backend: str, gpu: dict[str, tuple[int, ...]]) -> None:
    request = cuda_request(op)
    assert refusals(op, request)[backend] is None
    assert refusals(op, request._replace(device="cpu"))[backend] == "only on CUDA devices"


def picked(op: Op[Any], request: Any) -> str:
    """What auto would pick, without remembering it."""
    return next(choice.backend for choice in op.explain(request) if choice.picked)


@pytest.mark.usefixtures("gpu")
def test_what_is_picked_on_a_gpu() -> None:
    picks = {op.name: picked(op, cuda_request(op)) for op in (SSD, CONV, ATTENTION)}
    assert picks == {"ssd": "mamba_ssm", "causal_conv1d": "fla", "attention": "flash_attn_3"}


def test_what_is_picked_on_a_gpu_with_nothing_but_torch(gpu: dict[str, tuple[int, ...]]) -> None:
    gpu.clear()
    request = cuda_request(ATTENTION)
    picks = {
        "varlen": request,
        "sdpa": request._replace(windowed=False, segments=False),
        "flex": request._replace(dtype=torch.float32),
        "blocked": request._replace(past=True),
    }
    assert {name: picked(ATTENTION, asked) for name, asked in picks.items()} == {name: name for name in picks}
    assert picked(ATTENTION, request._replace(softcap=True)) == "flex"
    assert (picked(SSD, cuda_request(SSD)), picked(CONV, cuda_request(CONV))) == ("chunked", "shifted")


@pytest.mark.parametrize(
    ("op", "backend", "package"),
    [
        (SSD, "mamba_ssm", "mamba-ssm"),
        (SSD, "fla", "fla-core"),
        (CONV, "causal_conv1d", "causal-conv1d"),
        (CONV, "fla", "fla-core"),
        (ATTENTION, "flash_attn", "flash-attn"),
        (ATTENTION, "flash_attn_3", "flash-attn-3"),
        (ATTENTION, "flash_attn_4", "flash-attn-4"),
        (ATTENTION, "xformers", "xformers"),
        (ATTENTION, "fla", "fla-core"),
    ],
)
def test_packages_are_named(op: Op[Any], backend: str, package: str, gpu: dict[str, tuple[int, ...]]) -> None:
    request = cuda_request(op)._replace(dtype=torch.float64)  # the package comes before what it serves
    gpu[package] = (0, 0, 1)
    refusal = refusals(op, request)[backend]
    assert refusal is not None
    assert refusal.startswith(f"{package} ")
    assert refusal.endswith("or newer is needed, 0.1 is installed")
    del gpu[package]
    assert refusals(op, request)[backend] == f"{package} is not installed"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("op", "backend", "asked", "refusal"),
    [
        (SSD, "mamba_ssm", {"dtype": torch.float32}, "only float16 and bfloat16"),
        (SSD, "fla", {"dtype": torch.float64}, "only float16 and bfloat16"),
        (SSD, "fla", {"even": False}, "has no gradients where head_dim or state is odd"),
        (SSD, "fla", {"even": False, "gradients": False}, None),
        (CONV, "fla", {"dtype": torch.float64}, "has no float64"),
        (CONV, "fla", {"dtype": torch.float32}, None),
        (CONV, "fla", {"taps": 1}, "only 2 taps and more"),
        (CONV, "causal_conv1d", {"dtype": torch.float64}, "has no float64"),
        (CONV, "causal_conv1d", {"taps": 5}, "only 2 to 4 taps"),
        (CONV, "causal_conv1d", {"eights": False}, "the channels must be a multiple of 8"),
        (ATTENTION, "varlen", {"dtype": torch.float32}, "only float16 and bfloat16"),
        (ATTENTION, "varlen", {"past": True}, "serves no cached keys"),
        (ATTENTION, "varlen", {"softcap": True}, "has no softcap"),
        (ATTENTION, "varlen", {"value_dim": 32}, "wants value_dim = head_dim"),
        (ATTENTION, "varlen", {"head_dim": 20, "value_dim": 20}, "head_dim must be a multiple of 8"),
        (ATTENTION, "flash_attn", {"head_dim": 20, "value_dim": 20, "softcap": True}, None),
        (
            ATTENTION,
            "flash_attn_4",
            {"head_dim": 256, "value_dim": 256},
            "head_dim and value_dim must be at most 128",
        ),
        (ATTENTION, "xformers", {"softcap": True}, "has no softcap"),
        (ATTENTION, "fla", {"value_dim": 32}, None),
        (ATTENTION, "fla", {"value_dim": 512}, "head_dim and value_dim must be at most 256"),
        (ATTENTION, "flex", {"dtype": torch.float64}, "has no float64"),
        (ATTENTION, "flex", {"past": True}, "serves no cached keys"),
        (ATTENTION, "flex", {"head_dim": 8, "value_dim": 8}, "head_dim and value_dim must be at least 16"),
        (ATTENTION, "flex_cpu", {}, "only on the CPU"),
        (ATTENTION, "flex_cpu", {"device": "cpu", "dtype": torch.float32}, "has no gradients on the CPU"),
        (ATTENTION, "flex_cpu", {"device": "cpu", "dtype": torch.float32, "gradients": False}, None),
    ],
)
def test_features_are_named(op: Op[Any], backend: str, asked: dict[str, Any], refusal: str | None) -> None:
    assert refusals(op, cuda_request(op)._replace(**asked))[backend] == refusal


@pytest.mark.parametrize(
    ("triton", "tilelang", "refused"),
    [((3, 6, 0), False, True), ((3, 7, 0), False, True), ((3, 7, 1), False, False), ((3, 6, 0), True, False)],
)
def test_gradients_that_fla_refuses_on_hopper(
    triton: tuple[int, ...], tilelang: bool, refused: bool, gpu: dict[str, tuple[int, ...]]
) -> None:
    gpu["triton"] = triton
    if tilelang:
        gpu["tilelang"] = (0, 1, 15)
    request = cuda_request(SSD)
    assert (refusals(SSD, request)["fla"] is not None) == refused
    assert refusals(SSD, request._replace(gradients=False))["fla"] is None


def test_gpus_and_torch_that_lack_something(gpu: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontree.kernels.attention.packing.capability", lambda: (7, 5))
    found = refusals(ATTENTION, cuda_request(ATTENTION))
    assert found["varlen"] == "only on GPUs of compute capability 8 to 12"
    assert found["flash_attn_3"] == "only on GPUs of compute capability 9 to 9"
    monkeypatch.setattr(varlen, "built", lambda: False)
    monkeypatch.setattr(flex, "compiler", lambda: None)
    found = refusals(ATTENTION, cuda_request(ATTENTION))
    assert found["varlen"] == "torch was built without FlashAttention"
    assert found["flex"] == "Triton needs a C compiler, and none is installed"


def test_backends_are_chosen_while_a_model_is_compiled() -> None:
    """The real questions, asked of packages and of the GPU, may not break the graph."""
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        return x + sum(len(op.explain(cuda_request(op))) for op in (SSD, CONV, ATTENTION))

    torch.compile(run, backend="eager", fullgraph=True)(torch.ones(2))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_this_torch_takes_the_call_of_varlen(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the real operator, on tensors that have shapes alone."""
    monkeypatch.setattr(varlen, "load", REAL["varlen"])
    q, k, v = (one.to("meta").requires_grad_() for one in attention_tensors(kv_heads) if one is not None)
    y = ATTENTION.backends["varlen"].run(AttentionInputs(q, k, v, 3, 0.4, None, None))
    y.sum().backward()
    assert [one.shape for one in (y, q.grad, k.grad, v.grad)] == [q.shape, q.shape, k.shape, v.shape]  # type: ignore[union-attr]


def package(folder: Path, name: str, modules: dict[str, str]) -> None:
    """Write a package of modules, by their paths."""
    for path, text in modules.items():
        file = folder / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_mamba_ssm_is_loaded_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases known to allow it; of others the package itself is imported, and here says what it lacks."""
    package(
        tmp_path,
        "mamba_ssm",
        {
            "__init__.py": "import selective_scan_cuda",
            "ops/__init__.py": "",
            "ops/triton/__init__.py": "",
            "ops/triton/ssd_combined.py": "mamba_chunk_scan_combined = 'kernels'",
        },
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mamba_ssm, "installed", {"mamba-ssm": (2, 4)}.get)
    with pytest.raises(ImportError, match="selective_scan_cuda"):
        REAL["mamba_ssm"]()
    monkeypatch.setattr(mamba_ssm, "installed", {"mamba-ssm": (2, 3, 2)}.get)
    assert REAL["mamba_ssm"]() == "kernels"
    assert "mamba_ssm" not in sys.modules
    for name in [name for name in sys.modules if name.startswith("mamba_ssm.")]:
        del sys.modules[name]


def test_importing_fusiontree_imports_no_library_and_no_compiler() -> None:
    heavy = ("torch._dynamo", "torch.nn.attention.varlen", "triton", "mamba_ssm", "fla", "flash_attn", "xformers")
    code = f"import sys, fusiontree; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(("text", "numbers"), [("2.3.2.post1", (2, 3, 2, 1)), ("4.0.0b36", (4, 0, 0, 36))])
def test_releases_are_compared_by_their_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert packages.release(text) == numbers
