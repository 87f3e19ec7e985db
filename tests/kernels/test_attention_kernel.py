import gc

import pytest
import torch
from kernel_cases import Draw, LargestTensor, assert_all_close, assert_close, at_real, leaves, saved_elements, serving
from torch import Tensor

from fusiontree.kernels import UnsupportedError
from fusiontree.kernels.attention import ATTENTION, AttentionInputs, Past, attention, blocked
from fusiontree.testing.operators import LENGTHS, continued, gradients, segments_from

ROWS, HEADS, KV_HEADS, WIDTH = 6, 4, 2, 8
SCALE = 0.4
SLOPES = (0.5, 0.03125, 2.0, 0.0)
"""Of each head; exact in every type."""
WINDOWS = [(time, window) for time in LENGTHS for window in (*sorted({1, 2, 7, 64, time, time + 1}), None)]


def draw_inputs(time: int, value_dim: int = WIDTH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = Draw(time, dtype)
    shapes = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, value_dim))
    return [draw.normal(ROWS, time, *shape) for shape in shapes]


def draw_past(cached: int, value_dim: int = WIDTH, dtype: torch.dtype = torch.float64) -> Past:
    """Slots in random order; some are empty, in one row all."""
    draw = Draw(cached + 100, dtype)
    keys, values = draw.normal(ROWS, cached, KV_HEADS, WIDTH), draw.normal(ROWS, cached, KV_HEADS, value_dim)
    age = torch.stack([torch.randperm(cached, generator=draw.generator) + 1 for _ in range(ROWS)])
    age[:, draw.integer(cached)] = 0
    age[0] = 0
    return Past(keys, values, age)


def serves(inputs: list[Tensor], **options: object) -> list[str]:
    defaults = {"window": None, "scale": SCALE, "softcap": None, "segments": None, "past": None}
    return serving(ATTENTION, AttentionInputs(*inputs, **{**defaults, **options}).request)  # type: ignore[arg-type]


def brute_force(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    segments: Tensor | None = None,
    slopes: tuple[float, ...] | None = None,
    past: Past | None = None,
    prefix: int = 0,
) -> Tensor:
    """Row by row, head by head, query by query, with lists of visible keys: the definition as a program."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for row in range(q.shape[0]):
        own = torch.zeros(q.shape[1], dtype=torch.long) if segments is None else segments[row]
        for i in range(q.shape[1]):
            if own[i] < 0:
                continue
            ages = past.age[row].tolist() if past is not None and own[i] == 0 else []
            mine = [j for j in range(i + 1) if own[j] == own[i]]
            always = [] if any(ages) else mine[:prefix]
            seen = [j for j in mine if window is None or i - j < window or j in always]
            keys, values, distances = k[row, seen], v[row, seen], [i - j for j in seen]
            if past is not None and ages:
                near = [window is None or i + age < window for age in ages]
                old = [c for c, age in enumerate(ages) if age > 0 and (near[c] or c < prefix)]
                keys = torch.cat([past.keys[row, old].double(), keys])
                values = torch.cat([past.values[row, old].double(), values])
                distances = [i + ages[c] for c in old] + distances
            for head in range(HEADS):
                scores = SCALE * keys[:, head // (HEADS // KV_HEADS)] @ q[row, i, head]
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                scores = scores if slopes is None else scores - slopes[head] * torch.tensor(distances)
                y[row, i, head] = scores.softmax(0) @ values[:, head // (HEADS // KV_HEADS)]
    return y


@pytest.mark.parametrize(
    ("softcap", "prefix", "slopes"),
    [(None, 0, None), (1.5, 0, None), (None, 3, None), (None, 0, SLOPES), (1.5, 3, SLOPES)],
)
@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 20, None])
@pytest.mark.parametrize(("packed", "cached"), [(False, 0), (True, 0), (False, 5), (True, 5)])
def test_is_its_definition(
    window: int | None,
    packed: bool,
    cached: int,
    softcap: float | None,
    prefix: int,
    slopes: tuple[float, ...] | None,
) -> None:
    inputs = draw_inputs(8, value_dim=5)
    segments = Draw(3).segments(8) if packed else None
    past = draw_past(cached, value_dim=5) if cached else None
    options = {"window": window, "softcap": softcap, "segments": segments, "past": past, "prefix": prefix}
    options |= {"slopes": slopes}
    want = brute_force(*inputs, **options)
    for backend in serves(inputs, **options):
        got = attention(*inputs, scale=SCALE, backend=backend, **options)
        assert torch.isfinite(got).all()
        assert_close(at_real(got, segments), at_real(want, segments), what=backend)


@pytest.mark.parametrize("time", [2, 40])
def test_a_negative_scale_is_that_of_negated_queries(time: int) -> None:
    """torch's fused kernel gives NaN for one."""
    q, k, v = draw_inputs(time)
    want = attention(-q, k, v, scale=SCALE, backend="reference")
    for backend in ("auto", *serves([q, k, v])):
        assert_close(attention(q, k, v, scale=-SCALE, backend=backend), want, what=backend)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("time", "window"), WINDOWS)
def test_backends_agree_with_the_reference(time: int, window: int | None, packed: bool) -> None:
    segments = Draw(time).segments(time) if packed else None
    draws = draw_inputs(time)
    exact = leaves(draws, [torch.float64] * 3)
    want = attention(*exact, window=window, scale=SCALE, segments=segments, backend="reference")
    want_grads = gradients((at_real(want, segments),), exact)
    for dtype in (torch.float64, torch.float32):
        rounded = leaves(draws, [dtype] * 3)
        for backend in serves(rounded, window=window, segments=segments):
            got = attention(*rounded, window=window, scale=SCALE, segments=segments, backend=backend)
            assert got.dtype == dtype
            assert_close(at_real(got, segments), at_real(want, segments), dtype, backend)
            grads = gradients((at_real(got, segments),), rounded)
            assert_all_close(grads, want_grads, dtype, f"gradients of {backend}")


@pytest.mark.parametrize(("value_dim", "softcap"), [(WIDTH, None), (WIDTH, 2.0), (5, None), (11, 2.0)])
@pytest.mark.parametrize("cached", [0, 1, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_options_agree_with_the_reference(
    dtype: torch.dtype, cached: int, value_dim: int, softcap: float | None
) -> None:
    time, window = 150, 60
    segments, past = Draw(7).segments(time), draw_past(cached, value_dim, dtype) if cached else None
    draws = draw_inputs(time, value_dim, dtype)
    options = {"window": window, "softcap": softcap, "segments": segments}
    exact = leaves(draws, [torch.float64] * 3)
    want = attention(*exact, scale=SCALE, past=past, backend="reference", **options)
    want_grads = gradients((at_real(want, segments),), exact)
    for backend in serves(leaves(draws, [dtype] * 3), past=past, **options):
        rounded = leaves(draws, [dtype] * 3)
        held = past and Past(past.keys.to(dtype), past.values.to(dtype), past.age)
        got = attention(*rounded, scale=SCALE, past=held, backend=backend, **options)
        assert_close(at_real(got, segments), at_real(want, segments), dtype, backend)
        grads = gradients((at_real(got, segments),), rounded)
        assert_all_close(grads, want_grads, dtype, f"gradients of {backend}")


@pytest.mark.parametrize("cached", [0, 20])
@pytest.mark.parametrize("starts", [(), (140,), (3, 127, 128, 131, 290)])
@pytest.mark.parametrize(("window", "prefix"), [(7, 3), (40, 1), (60, 130), (90, 300)])
@pytest.mark.parametrize("slopes", [None, (0.013, 0.5, 1e-3, 0.11)])
def test_a_prefix_is_in_sight_of_every_block(
    window: int, prefix: int, starts: tuple[int, ...], cached: int, slopes: tuple[float, ...] | None
) -> None:
    draws, past = draw_inputs(300), draw_past(cached) if cached else None
    segments = segments_from(starts, 300).clone() if starts else None
    if segments is not None:
        segments[1, 200:] = -1
    options = {"window": window, "segments": segments, "slopes": slopes, "past": past, "prefix": prefix}
    exact = leaves(draws, [torch.float64] * 3)
    want = attention(*exact, scale=SCALE, backend="reference", **options)
    want_grads = gradients((at_real(want, segments),), exact)
    assert not torch.allclose(want, attention(*exact, scale=SCALE, **{**options, "prefix": 0}))
    for backend in serves(exact, **options):
        got = attention(*exact, scale=SCALE, backend=backend, **options)
        assert_close(at_real(got, segments), at_real(want, segments), what=backend)
        assert_all_close(gradients((at_real(got, segments),), exact), want_grads, torch.float64, backend)


@pytest.mark.parametrize(
    ("window", "packed", "cached"), [(None, False, 0), (None, True, 0), (60, True, 0), (60, True, 70)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slopes_agree_with_the_reference(dtype: torch.dtype, window: int | None, packed: bool, cached: int) -> None:
    time = 300
    segments, past = Draw(7).segments(time) if packed else None, draw_past(cached, dtype=dtype) if cached else None
    draws = draw_inputs(time, dtype=dtype)
    options = {"window": window, "segments": segments, "slopes": (0.013, 0.5, 1e-3, 0.11)}
    exact = leaves(draws, [torch.float64] * 3)
    want = attention(*exact, scale=SCALE, past=past, backend="reference", **options)
    want_grads = gradients((at_real(want, segments),), exact)
    backends = serves(leaves(draws, [dtype] * 3), past=past, **options)
    assert {"reference", "blocked", "blocked_flash"} <= set(backends)
    for backend in backends:
        rounded = leaves(draws, [dtype] * 3)
        held = past and Past(past.keys.to(dtype), past.values.to(dtype), past.age)
        got = attention(*rounded, scale=SCALE, past=held, backend=backend, **options)
        assert_close(at_real(got, segments), at_real(want, segments), dtype, backend)
        grads = gradients((at_real(got, segments),), rounded)
        assert_all_close(grads, want_grads, dtype, f"gradients of {backend}")


@pytest.mark.parametrize("backend", ["blocked", "blocked_flash"])
def test_far_keys_that_count_are_not_rounded_to_what_queries_have_room_for(backend: str) -> None:
    """Keys whose scores grow as fast with the distance as slopes make them fall."""
    time, slope = 300, 1.0
    near = torch.arange(time, 0, -1).double() * slope / (SCALE * WIDTH)
    k = near[:, None, None].expand(1, time, KV_HEADS, WIDTH).bfloat16()
    q, v = torch.ones(1, time, HEADS, WIDTH).bfloat16(), draw_inputs(time)[2][:1].bfloat16()
    options = {"scale": SCALE, "slopes": (slope,) * HEADS}
    want = attention(q.double(), k.double(), v.double(), backend="reference", **options)
    got = attention(q, k, v, backend=backend, **options)
    assert_close(got[:, 200:], want[:, 200:], torch.bfloat16)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
def test_grouped_heads_are_repeated_keys(heads: tuple[int, int]) -> None:
    draw, (many, few) = Draw(2), heads
    q, k, v = draw.normal(2, 140, many, 4), draw.normal(2, 140, few, 4), draw.normal(2, 140, few, 4)
    full_k, full_v = (one.repeat_interleave(many // few, 2) for one in (k, v))
    for window in (None, 50):
        for backend in serves([q, k, v], window=window):
            want = attention(q, full_k, full_v, window=window, scale=SCALE, backend="reference")
            assert_close(attention(q, k, v, window=window, scale=SCALE, backend=backend), want, what=backend)


@pytest.mark.parametrize("window", [40, 128, None])
@pytest.mark.parametrize("starts", [(128,), (256,), (300,), (127, 128, 129, 384, 500)])
def test_documents_may_start_at_the_edges_of_blocks(window: int | None, starts: tuple[int, ...]) -> None:
    draws, segments = [tensor[:1] for tensor in draw_inputs(520)], segments_from(starts, 520)[:1]
    exact = leaves(draws, [torch.float64] * 3)
    want = attention(*exact, window=window, scale=SCALE, segments=segments, backend="reference")
    want_grads = gradients((want,), exact)
    for backend in serves(exact, window=window, segments=segments):
        got = attention(*exact, window=window, scale=SCALE, segments=segments, backend=backend)
        assert_close(got, want, what=backend)
        assert_all_close(gradients((got,), exact), want_grads, torch.float64, f"gradients of {backend}")


def cache_at(k: Tensor, v: Tensor, segments: Tensor, cut: int) -> Past:
    """The keys before `cut` in a shuffled cache with an empty slot, each row holding its last document's."""
    before = segments[:, :cut]
    mine = (before == before.amax(1, keepdim=True)) & (before >= 0)
    age = torch.where(mine, torch.arange(cut, 0, -1), 0)
    order = torch.randperm(cut + 1, generator=torch.Generator().manual_seed(cut))
    age = torch.cat([age, torch.zeros_like(age[:, :1])], 1)[:, order]
    keys, values = (torch.cat([one[:, :cut], 1e3 * torch.ones_like(one[:, :1])], 1)[:, order] for one in (k, v))
    return Past(keys, values, age)


@pytest.mark.parametrize("window", [1, 2, 33, 140, None])
@pytest.mark.parametrize("cuts", [(1,), (129,), (3, 40, 41, 42), (138, 139)])
def test_a_split_sequence_is_the_whole(window: int | None, cuts: tuple[int, ...]) -> None:
    q, k, v = draw_inputs(140)
    segments = Draw(6).segments(140)
    want = attention(q, k, v, window=window, scale=SCALE, segments=segments, backend="reference")
    for start, stop in zip((0, *cuts), (*cuts, 140), strict=True):
        past = cache_at(k, v, segments, start) if start else None
        own = continued(segments, start)[:, : stop - start] if start else segments[:, :stop]
        parts = [tensor[:, start:stop] for tensor in (q, k, v)]
        real = own >= 0
        for backend in serves(parts, window=window, segments=own, past=past):
            got = attention(*parts, window=window, scale=SCALE, segments=own, past=past, backend=backend)
            assert torch.isfinite(got).all()
            assert_close(got[real], want[:, start:stop][real], what=f"{backend} at {start}")


@pytest.mark.parametrize("backend", ["blocked", "blocked_flash"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("slopes", [None, (0.5, 0.25)])
def test_windowed_blocks_are_linear_in_time(slopes: tuple[float, ...] | None, backend: str, packed: bool) -> None:
    time, window = 65536, 100
    inputs = leaves(
        [torch.ones(1, time, 2, 4), torch.ones(1, time, 1, 4), torch.ones(1, time, 1, 4)], [torch.float32] * 3
    )
    segments = (torch.arange(time) // 1000)[None] if packed else None
    with LargestTensor() as largest:
        y = attention(*inputs, window=window, scale=1.0, segments=segments, slopes=slopes, backend=backend)
        assert saved_elements(y) <= 32 * time
        y.sum().backward()
    assert largest.elements <= 8 * time


@pytest.mark.parametrize("backend", ["blocked", "blocked_flash"])
def test_packed_full_attention_costs_its_documents_only(backend: str) -> None:
    """262144 tokens in documents of 64: the square would take minutes."""
    time = 1 << 18
    inputs = [torch.ones(1, time, 1, 4) for _ in range(3)]
    y = attention(*inputs, scale=1.0, segments=(torch.arange(time) // 64)[None], backend=backend)
    assert_close(y, torch.ones_like(y), torch.float32)


def test_masks_of_a_long_document_are_not_kept_for_other_calls() -> None:
    """Without a window every block has a mask of its own, and all of them are as large as the square's half."""
    time = 8192
    inputs = [torch.ones(1, time, 1, 1) for _ in range(3)]
    before = alive()
    attention(*inputs, scale=1.0, segments=torch.zeros(1, time, dtype=torch.long), backend="blocked_flash")
    assert alive() - before <= 2**24


def alive() -> int:
    """The elements of all tensors that somebody holds."""
    gc.collect()
    return sum(tensor.numel() for tensor in gc.get_objects() if type(tensor) is Tensor)


def test_refusals_say_why() -> None:
    inputs = draw_inputs(3)
    with pytest.raises(UnsupportedError, match=r"'sdpa' cannot serve this call: .*a window"):
        attention(*inputs, window=2, scale=SCALE, backend="sdpa")
    with pytest.raises(UnsupportedError, match=r"'sdpa' cannot serve this call: not served: slopes"):
        attention(*inputs, slopes=SLOPES, scale=SCALE, backend="sdpa")
    with pytest.raises(UnsupportedError, match="softcap"):
        attention(*inputs, softcap=2.0, scale=SCALE, backend="blocked_flash")


@pytest.mark.parametrize("window", [None, 200])
def test_few_biases_are_kept_however_long_the_text_is(window):
    """A band for each length of keys would be 18 MB at 2,048 tokens; what is left is one for each power of two."""
    blocked._band.cache_clear()
    q, k = torch.randn(1, 1100, 2, 4), torch.randn(1, 1100, 1, 4)
    found = attention(q, k, k, window=window, scale=0.5, backend="blocked")
    kept = blocked._band.cache_info().currsize
    assert 0 < kept <= 5
    wanted = attention(q, k, k, window=window, scale=0.5, backend="reference")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
