"""What libraries of GPU kernels do, in plain torch, behind their real signatures.

Each signature was read in the library's source, of the release named beside it; a call that the library would not
take fails here too. What is computed follows the library's documentation and kernels, traps included.
"""

from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from einops import einsum, repeat
from torch import Tensor


def behind(declared: Callable[..., Any], behaviour: Callable[[SimpleNamespace], Any]) -> Callable[..., Any]:
    """A function with the signature of `declared`."""
    takes = signature(declared)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = takes.bind(*args, **kwargs)
        bound.apply_defaults()
        return behaviour(SimpleNamespace(**bound.arguments))

    call.__signature__ = takes  # type: ignore[attr-defined]
    return call


def scanned(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """S = kept exp(log_decay) S + v k^T and y = S q, all [batch, time, heads, ...]; the state is [value, key]."""
    outputs = []
    for t in range(q.shape[1]):
        decay = torch.where(kept[:, t, None], log_decay[:, t].exp(), 0.0)
        state = decay[..., None, None] * state + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((state * q[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, 1), state


# mamba_ssm.ops.triton.ssd_combined, mamba-ssm 2.3.2.post1
def _mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
): ...  # fmt: skip


def _mamba(call: SimpleNamespace) -> Any:
    x, B = call.x, call.B
    batch, time, heads, width = x.shape
    assert call.dt.shape == (batch, time, heads)
    assert call.A.shape == (heads,)
    assert B.shape == call.C.shape
    assert call.D is call.z is call.dt_bias is call.cu_seqlens is None
    assert call.chunk_size == 2 ** (call.chunk_size.bit_length() - 1)
    state = x.new_zeros(batch, heads, width, B.shape[-1], dtype=call.dt.dtype)
    if call.initial_states is not None:
        assert call.initial_states.shape == state.shape
        state = call.initial_states
    # What the kernels compare the first token with is 0, whatever there is of an initial state.
    numbers = x.new_zeros(batch, time + 1, dtype=torch.int32)
    if call.seq_idx is not None:
        assert (call.seq_idx.shape, call.seq_idx.dtype) == ((batch, time), torch.int32)
        numbers[:, 1:] = call.seq_idx
    q, k = (repeat(one, "b t g n -> b t (g r) n", r=heads // B.shape[2]) for one in (call.C, B))
    kept = numbers[:, 1:] == numbers[:, :-1]
    y, final = scanned(q, k, x * call.dt[..., None], call.dt * call.A, state, kept)
    return (y.to(x.dtype), final) if call.return_final_states else y.to(x.dtype)


mamba_chunk_scan_combined = behind(_mamba_chunk_scan_combined, _mamba)


# fla.ops.simple_gla, fla-core 0.6.0
def _chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
): ...  # fmt: skip


def _simple_gla(call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    assert call.q.shape == call.k.shape
    assert not call.kwargs
    assert (call.scale, call.state_v_first, call.output_final_state) == (1.0, True, True)
    spans = sequences(call, call.q)
    assert len(call.initial_state) == len(spans)
    outputs, states = [], []
    for (row, span), state in zip(spans, call.initial_state, strict=True):
        q, k, v, g = (one[row, span][None] for one in (call.q, call.k, call.v, call.g))
        y, state = scanned(q, k, v, g, state[None], torch.ones_like(g[..., 0], dtype=torch.bool))
        outputs.append(y[0])
        states.append(state[0])
    return torch.cat(outputs).reshape(call.v.shape).to(call.q.dtype), torch.stack(states)


def sequences(call: SimpleNamespace, values: Tensor) -> list[tuple[int, slice]]:
    """Row and place of each sequence: those between bounds, or whole rows."""
    if call.cu_seqlens is None:
        return [(row, slice(None)) for row in range(len(values))]
    assert len(values) == 1
    if hasattr(call, "cu_seqlens_cpu"):
        assert torch.equal(call.cu_seqlens_cpu, call.cu_seqlens)
    return [(0, slice(*ends)) for ends in pairwise(bounds_of(call.cu_seqlens, values.shape[1]))]


def bounds_of(cu_seqlens: Tensor, tokens: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32
    assert (bounds[0], bounds[-1]) == (0, tokens)
    assert all(start < stop for start, stop in pairwise(bounds)), "a sequence without tokens"
    return bounds


chunk_simple_gla = behind(_chunk_simple_gla, _simple_gla)


# causal_conv1d.causal_conv1d_fn, causal-conv1d 1.7.0
def _causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
): ...  # fmt: skip


def _conv_cuda(call: SimpleNamespace) -> Tensor:
    x, (channels, taps) = call.x, call.weight.shape
    assert x.stride(1) == 1, "channels come last in memory"
    assert channels % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert 2 <= taps <= 4
    assert not call.return_final_states
    assert call.activation is call.final_states_out is None
    before = x.new_zeros(len(x), channels, taps - 1)
    if call.initial_states is not None:
        assert call.initial_states.stride(1) == 1
        assert call.initial_states.dtype == x.dtype
        before = call.initial_states
    # The state belongs to the first token's sequence, whatever number that has; negative numbers are padding.
    numbers = x.new_zeros(len(x), x.shape[2], dtype=torch.int32) if call.seq_idx is None else call.seq_idx
    assert numbers.dtype == torch.int32
    owners = torch.cat([numbers[:, :1].expand(-1, taps - 1), numbers], 1)
    seen = (owners.unfold(1, taps, 1) == numbers[..., None])[:, None]
    y = (torch.cat([before, x], 2).unfold(2, taps, 1) * seen * call.weight[:, None]).sum(-1)
    y = y if call.bias is None else y + call.bias[:, None]
    return y.masked_fill((numbers < 0)[:, None], 0.0).to(x.dtype)


causal_conv1d_fn = behind(_causal_conv1d_fn, _conv_cuda)


# fla.modules.causal_conv1d, fla-core 0.6.0
def _causal_conv1d(
    x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None,
    backend="triton", cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs,
): ...  # fmt: skip


def _conv_fla(call: SimpleNamespace) -> tuple[Tensor, None]:
    x, (channels, taps) = call.x, call.weight.shape
    assert not call.kwargs
    assert call.activation is call.residual is call.cp_context is None
    spans = sequences(call, x)
    before = x.new_zeros(len(spans), channels, taps)
    if call.initial_state is not None:
        assert call.initial_state.shape == before.shape
        before = call.initial_state
    outputs = []
    for (row, span), state in zip(spans, before, strict=True):
        windows = torch.cat([state[:, 1:], x[row, span].mT], 1).unfold(1, taps, 1)
        outputs.append((windows * call.weight[:, None]).sum(-1).mT)
    y = torch.cat(outputs).reshape(x.shape)
    return (y if call.bias is None else y + call.bias).to(x.dtype), None


fla_causal_conv1d = behind(_causal_conv1d, _conv_fla)


def attended(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], seen: Callable[[Tensor], Tensor], score: Any
) -> Tensor:
    """Softmax attention of each sequence by itself; `seen` is asked about the distance from a query back to a key."""
    share, outputs = q.shape[1] // k.shape[1], []
    k, v = (repeat(one, "t hk d -> t (hk r) d", r=share) for one in (k, v))
    for start, stop in pairwise(bounds):
        places = torch.arange(stop - start)
        scores = score(einsum(q[start:stop], k[start:stop], "i h d, j h d -> h i j"))
        scores = scores.masked_fill(~seen(places[:, None] - places), -torch.inf)
        outputs.append(einsum(scores.softmax(-1), v[start:stop], "h i j, j h d -> i h d"))
    return torch.cat(outputs)


def between(left: int | None, right: int | None) -> Callable[[Tensor], Tensor]:
    """FlashAttention's window: at most so far to the left and to the right; negative and None have no end."""

    def seen(distance: Tensor) -> Tensor:
        near = torch.ones_like(distance, dtype=torch.bool)
        near = near if left is None or left < 0 else near & (distance <= left)
        return near if right is None or right < 0 else near & (-distance <= right)

    return seen


def scaled(scale: float, softcap: float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda scores: softcap * torch.tanh(scores * scale / softcap) if softcap else scores * scale


# torch.nn.attention.varlen, torch 2.11.0
def _varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
): ...  # fmt: skip


# torch.nn.attention.varlen, torch 2.13.0
def _varlen_attn_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
): ...  # fmt: skip


def _varlen(call: SimpleNamespace) -> Tensor:
    assert call.query.shape[1] == call.key.shape[1] or call.enable_gqa
    bounds = bounds_of(call.cu_seq_q, len(call.query))
    assert call.cu_seq_k is call.cu_seq_q
    assert call.max_q == call.max_k == max(stop - start for start, stop in pairwise(bounds))
    assert type(call.window_size) is tuple  # torch compares it with (-1, 0)
    return attended(call.query, call.key, call.value, bounds, between(*call.window_size), scaled(call.scale))


varlen_attn_2_11 = behind(_varlen_attn_2_11, _varlen)
varlen_attn_2_13 = behind(_varlen_attn_2_13, _varlen)


# flash_attn, flash-attn 2.8.3.post2
def _flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
): ...  # fmt: skip


# hopper/flash_attn_interface.py in the source of flash-attn 2.8.3.post2
def _flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
): ...  # fmt: skip


# flash_attn.cute, flash-attn-4 4.0.0b36
def _flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
): ...  # fmt: skip


def _flash(call: SimpleNamespace) -> Tensor:
    bounds = bounds_of(call.cu_seqlens_q, len(call.q))
    assert call.cu_seqlens_k is call.cu_seqlens_q
    assert call.max_seqlen_q == call.max_seqlen_k == max(stop - start for start, stop in pairwise(bounds))
    assert call.causal is True
    seen, score = between(call.window_size[0], 0), scaled(call.softmax_scale, call.softcap)
    slopes = getattr(call, "alibi_slopes", None)
    if slopes is not None:
        assert (slopes.dtype, slopes.shape) == (torch.float32, call.q.shape[1:2])
        return attended(call.q, call.k, call.v, bounds, seen, lambda scores: falling(score(scores), slopes))
    return attended(call.q, call.k, call.v, bounds, seen, score)


def falling(scores: Tensor, slopes: Tensor) -> Tensor:
    places = torch.arange(scores.shape[1])
    return scores - slopes[:, None, None] * (places[:, None] - places).abs()


def _flash_4(call: SimpleNamespace) -> tuple[Tensor, None]:
    assert -1 not in call.window_size
    return _flash(call), None


flash_attn_2 = behind(_flash_attn_2, _flash)
flash_attn_3 = behind(_flash_attn_3, _flash)
flash_attn_4 = behind(_flash_attn_4, _flash_4)


# fla.ops.attn.parallel_attn, fla-core 0.6.0
def _parallel_attn(
    q, k, v, g=None, scale=None, window_size=None, cu_seqlens=None, chunk_indices=None, *, sink_bias=None,
): ...  # fmt: skip


def _parallel(call: SimpleNamespace) -> Tensor:
    assert call.g is call.sink_bias is None
    assert len(call.q) == 1
    bounds, window = bounds_of(call.cu_seqlens, call.q.shape[1]), call.window_size
    seen = between(None if window is None else window - 1, 0)  # keys in [i - window + 1, i]
    return attended(call.q[0], call.k[0], call.v[0], bounds, seen, scaled(call.scale))[None]


parallel_attn = behind(_parallel_attn, _parallel)


# xformers.ops.fmha, xformers 0.0.35
def _memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
): ...  # fmt: skip


class BlockDiagonalMask:
    """xformers.ops.fmha.attn_bias.BlockDiagonalMask and its causal kinds; a window counts keys."""

    def __init__(self, lengths: list[int]) -> None:
        self.bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        self.seen: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: Any = None, *, device: Any = None) -> "BlockDiagonalMask":
        assert kv_seqlen is None
        assert all(type(length) is int for length in q_seqlen)
        assert device is not None, "masks would be made on the current GPU"
        return cls(q_seqlen)

    def make_causal(self) -> "BlockDiagonalMask":
        self.seen = between(None, 0)
        return self

    def make_local_attention(self, window_size: int) -> "BlockDiagonalMask":
        self.seen = lambda distance: (distance >= 0) & (distance < window_size)
        return self


def _efficient(call: SimpleNamespace) -> Tensor:
    assert call.query.shape[:3] == call.key.shape[:3] == call.value.shape[:3]
    mask, (q, k, v) = call.attn_bias, (one[0] for one in (call.query, call.key, call.value))
    assert mask.bounds[-1] == len(q)
    return attended(q, k, v, mask.bounds, mask.seen, scaled(call.scale))[None]


memory_efficient_attention = behind(_memory_efficient_attention, _efficient)
