"""`ssd` in chunks: matrix products within a chunk, the recurrence between chunks.

The dual form of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 6). What makes it fast here: B and C
are never repeated to heads (C B^T once a group, the state's products over all heads of a group at once);
some chunks are taken at a time, so that temporaries fit a cache; the cumulative sums of the log decay
restart at each chunk and no exponent is ever positive; backward stores only the states between steps.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.kernels.documents import padding_joined, silence_padding
from fusiontree.kernels.scan.op import SSD, SSDInputs

CHUNK = 64
CHUNKS_A_STEP = 4


class Step(NamedTuple):
    """The tokens of some whole chunks. `entering`: the segment of the state each chunk starts from."""

    x: Float[Tensor, "batch chunks*chunk heads head_dim"]
    dt: Float[Tensor, "batch chunks*chunk heads"]
    B: Float[Tensor, "batch chunks*chunk groups state"]
    C: Float[Tensor, "batch chunks*chunk groups state"]
    segments: Int[Tensor, "batch chunks chunk"] | None
    entering: Int[Tensor, "batch chunks 1"] | None


class Decays(NamedTuple):
    """Factors in [0, 1], all per group and head of the group (`r`), zero across documents."""

    within: Float[Tensor, "b c g r chunk chunk"]
    entry: Float[Tensor, "b c g r chunk"]
    exit: Float[Tensor, "b c g r chunk"]
    across: Float[Tensor, "b c g r 1"]


def _exp_where(visible: Bool[Tensor, "..."] | None, exponent: Tensor) -> Tensor:
    # The mask comes before exp: an exponent that looks ahead is positive and may overflow.
    return torch.exp(exponent if visible is None else exponent.masked_fill(~visible, -torch.inf))


def _decays(log_decay: Float[Tensor, "b c g r chunk"], step: Step) -> Decays:
    total = log_decay.cumsum(-1)
    causal = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril()
    entry = exit = across = None
    if step.segments is not None and step.entering is not None:
        own = step.segments[:, :, None, None, :]
        first, last = step.entering[:, :, None, None, :], own[..., -1:]
        causal = causal & (own[..., :, None] == own[..., None, :])
        entry, exit, across = own == first, own == last, first == last
    return Decays(
        within=_exp_where(causal, total[..., :, None] - total[..., None, :]),
        entry=_exp_where(entry, total),
        exit=_exp_where(exit, total[..., -1:] - total),
        across=_exp_where(across, total[..., -1:]),
    )


def chunked_step(
    step: Step, A: Float[Tensor, "heads"], state: Float[Tensor, "batch groups state r*head_dim"], chunk: int
) -> tuple[Float[Tensor, "batch chunks*chunk heads head_dim"], Float[Tensor, "batch groups state r*head_dim"]]:
    """Some chunks at once: the outputs, and the state after them. Matrix products are in x's dtype."""
    groups, dtype = step.B.shape[2], step.x.dtype
    B = rearrange(step.B, "b (c q) g n -> b c g q n", q=chunk)
    C = rearrange(step.C, "b (c q) g n -> b c g q n", q=chunk)
    inflow = rearrange(step.x * step.dt[..., None], "b (c q) (g r) p -> b c g r q p", q=chunk, g=groups)
    decays = _decays(rearrange(step.dt * A, "b (c q) (g r) -> b c g r q", q=chunk, g=groups), step)

    similarity = (C @ B.mT)[:, :, :, None]
    y = (decays.within * similarity).to(dtype) @ inflow.to(dtype)

    stored = rearrange(inflow * decays.exit[..., None], "b c g r q p -> b c g q (r p)").to(dtype)
    added = (B.mT @ stored).to(state.dtype)
    kept = repeat(decays.across, "b c g r 1 -> b c g 1 (r p)", p=step.x.shape[-1])
    before = []
    for c in range(added.shape[1]):
        before.append(state)
        state = torch.addcmul(added[:, c], state, kept[:, c])
    read = rearrange(C @ torch.stack(before, dim=1).to(dtype), "b c g q (r p) -> b c g r q p", r=y.shape[3])
    y = torch.addcmul(y.to(state.dtype), read.to(state.dtype), decays.entry[..., None])
    return rearrange(y, "b c g r q p -> b (c q) (g r) p").to(dtype), state


def _spans(time: int) -> Iterator[tuple[slice, int]]:
    """Cut the time into steps of whole chunks, then one shorter chunk: nothing is ever padded."""
    whole = time - time % CHUNK
    for start in range(0, whole, CHUNK * CHUNKS_A_STEP):
        yield slice(start, min(start + CHUNK * CHUNKS_A_STEP, whole)), CHUNK
    if whole < time:
        yield slice(whole, time), time - whole


def _cut(tensors: tuple[Tensor, ...], segments: Tensor | None, span: slice, chunk: int) -> Step:
    x, dt, B, C = (tensor[:, span] for tensor in tensors)
    if segments is None:
        return Step(x, dt, B, C, None, None)
    own = rearrange(segments[:, span], "b (c q) -> b c q", q=chunk)
    first = segments[:, span.start - 1, None] if span.start else torch.zeros_like(segments[:, :1])
    return Step(x, dt, B, C, own, torch.cat([first, own[:, :-1, -1]], dim=1)[..., None])


class _Chunked(torch.autograd.Function):
    """Forward keeps the state before each step; backward runs the step again, with gradients."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, state: Tensor, segments: Tensor | None, *tokens: Tensor) -> Any:
        y, states = torch.empty_like(tokens[0]), []
        for span, chunk in _spans(y.shape[1]):
            states.append(state)
            y[:, span], state = chunked_step(_cut(tokens, segments, span, chunk), A, state, chunk)
        ctx.save_for_backward(A, segments, *tokens, *states)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y: Tensor, grad_state: Tensor
    ) -> Any:
        A, segments, x, dt, B, C, *states = ctx.saved_tensors
        tokens, grad_A = (x, dt, B, C), torch.zeros_like(A)
        grads = tuple(torch.empty_like(tensor) for tensor in tokens)
        for (span, chunk), state in reversed(list(zip(_spans(x.shape[1]), states, strict=True))):
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (A, state, x[:, span], dt[:, span])]
                leaves += [tensor[:, span].detach().requires_grad_() for tensor in (B, C)]
                again = _cut(tokens, segments, span, chunk)._replace(
                    x=leaves[2], dt=leaves[3], B=leaves[4], C=leaves[5]
                )
                outputs = chunked_step(again, leaves[0], leaves[1], chunk)
            part_A, grad_state, *parts = torch.autograd.grad(outputs, leaves, (grad_y[:, span], grad_state))
            grad_A += part_A
            for grad, part in zip(grads, parts, strict=True):
                grad[:, span] = part
        return grad_A, grad_state, None, *grads


@SSD.backend("chunked", priority=10)
def chunked(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """Linear in time and in memory; see the module's text."""
    x, dt, A, B, C, state, segments = inputs.prepared()
    assert state is not None
    groups = B.shape[2]
    joined = None if segments is None else padding_joined(segments)
    state = rearrange(state, "b (g r) p n -> b g n (r p)", g=groups)
    y, state = _Chunked.apply(A, state, joined, x, dt, B, C)
    final = rearrange(state, "b g n (r p) -> b (g r) p n", p=x.shape[-1])
    return silence_padding(y, segments), final
