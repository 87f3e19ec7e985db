"""FlexAttention on the CPU: the blocks it is given, the mask inside them, and compiled code."""

import pytest
import torch
from kernel_cases import Draw, assert_close, at_real
from torch import Tensor

from fusiontree import compiling, machine
from fusiontree.kernels import UnsupportedError
from fusiontree.kernels.attention import ATTENTION, AttentionInputs, attention, flex
from fusiontree.kernels.attention.visibility import visibility_of

BLOCK = flex.BLOCK


def dense(blocks: flex.FlexBlocks) -> Tensor:
    """Which blocks are named, [batch, blocks, blocks]; none may be named twice."""
    count, index = blocks.count[:, 0], blocks.index[:, 0].long()
    named = torch.arange(index.shape[-1]) < count[..., None]
    times = torch.zeros(index.shape, dtype=torch.long).scatter_add_(2, index, named.long())
    assert int(times.max()) <= 1
    return times.bool()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 127, 128, 129, 700])
@pytest.mark.parametrize("window", [1, 2, 128, 129, 300, None])
def test_blocks_are_those_with_visible_keys(window: int | None, time: int, packed: bool) -> None:
    segments = Draw(time).segments(time) if packed else None
    first = visibility_of(time, segments, None, (window, 0), torch.device("cpu")).first_visible
    own = torch.arange(time)
    seen = (own >= first[..., None]) & (own <= own[:, None])
    blocks = -(-time // BLOCK)
    full = torch.ones(len(first), blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    some = torch.zeros_like(full)
    full[:, :time, :time], some[:, :time, :time] = seen, seen
    full[:, :time, time:] = False
    shape = (-1, blocks, BLOCK, blocks, BLOCK)
    partly, wholly = (dense(one) for one in flex.visible(first))
    assert torch.equal(partly | wholly, some.reshape(shape).any(4).any(2))
    assert not (partly & wholly).any()
    assert (wholly <= full.reshape(shape).all(4).all(2)).all()


CASES = [(1, False), (2, True), (100, True), (257, True), (None, False), (None, True)]


def compare(
    window: int | None,
    packed: bool,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    slopes: tuple[float, ...] | None = None,
) -> None:
    draw, time = Draw(3), 257
    q, k, v = (draw.normal(6, time, heads, 16) for heads in (4, 2, 2))
    segments = draw.segments(time) if packed else None
    options = {"scale": 0.4, "window": window, "segments": segments, "softcap": softcap, "slopes": slopes}
    want = attention(q, k, v, backend="reference", **options)
    got = attention(q.to(dtype), k.to(dtype), v.to(dtype), backend="flex_cpu", **options)
    assert got.dtype == dtype
    assert_close(at_real(got, segments), at_real(want, segments), dtype)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "packed"), CASES)
def test_masks_are_the_reference(window: int | None, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled FlexAttention looks at the mask alone."""
    torch._dynamo.reset()
    monkeypatch.setattr(machine, "compile_refusal", lambda device: None)
    monkeypatch.setattr(compiling, "piece", lambda function, compiled: function)
    compare(window, packed)
    compare(window, packed, softcap=1.5)
    compare(window, packed, slopes=(0.5, 0.01, 0.1, 0.0))
    compare(window, packed, softcap=1.5, slopes=(0.5, 0.01, 0.1, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(("window", "packed"), CASES)
def test_compiled_code_is_the_reference(window: int | None, packed: bool) -> None:
    compare(window, packed)
    compare(window, packed, softcap=1.5)
    compare(window, packed, dtype=torch.bfloat16)
    compare(window, packed, slopes=(0.5, 0.01, 0.1, 0.0))


@pytest.mark.slow
def test_other_documents_need_no_other_code() -> None:
    draw = Draw(0)
    q = draw.normal(6, 129, 2, 16).float()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        attention(q, q, q, scale=1.0, segments=draw.segments(129), backend="flex_cpu")
    with torch._dynamo.config.patch(error_on_recompile=True):
        attention(q, q, q, scale=1.0, segments=draw.segments(129), backend="flex_cpu")
        attention(q, q, q, scale=1.0, segments=draw.segments(129), window=7, backend="flex_cpu")


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compile_refusal", lambda device: "no g++")
    q = torch.ones(1, 4, 2, 16)
    with pytest.raises(UnsupportedError, match=r"'flex_cpu' cannot serve this call: nothing can be compiled: no g\+\+"):
        attention(q, q, q, scale=1.0, backend="flex_cpu")


def test_nobody_asks_for_a_compiler_when_auto_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compile_refusal", lambda device: pytest.fail("took seconds"))
    q = torch.ones(1, 4, 2, 16)
    request = AttentionInputs(q, q, q, None, 1.0, None, None).request
    assert {choice.backend: choice.picked for choice in ATTENTION.explain(request)}["flex_cpu"] is False
