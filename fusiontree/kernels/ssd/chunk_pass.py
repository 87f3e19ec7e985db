"""Some whole chunks of `ssd` at once, forward and backward: matrix products in x's dtype, decays in the wide one.

B and C are never repeated to heads: C B^T is made once a group, and products with the state take all heads of a
group at once. The functions hold no loop over tokens and no data-dependent shape, so that `torch.compile` makes one
kernel of each.
"""

from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.chunks import Decays, Documents, by_chunk, by_token, forgotten

State = Float[Tensor, "batch groups state r*head_dim"]


class SSDTokens(NamedTuple):
    """The tokens of some whole chunks."""

    x: Float[Tensor, "batch chunks*chunk heads head_dim"]
    dt: Float[Tensor, "batch chunks*chunk heads"]
    B: Float[Tensor, "batch chunks*chunk groups state"]
    C: Float[Tensor, "batch chunks*chunk groups state"]
    documents: Documents | None


class SSDChunks(NamedTuple):
    """A step by chunk, group and head of the group."""

    x: Float[Tensor, "b c g r chunk p"]
    dt: Float[Tensor, "b c g r chunk"]
    B: Float[Tensor, "b c g chunk n"]
    C: Float[Tensor, "b c g chunk n"]
    decays: Decays
    documents: Documents | None

    @property
    def similarity(self) -> Float[Tensor, "b c g 1 chunk chunk"]:
        """C B^T, once for all heads of a group."""
        return (self.C @ self.B.mT)[:, :, :, None]

    @property
    def inflow(self) -> Float[Tensor, "b c g r chunk p"]:
        """What each token adds to the state, before B."""
        return (self.x * self.dt[..., None]).to(self.x.dtype)

    @property
    def stored(self) -> Float[Tensor, "b c g chunk r*p"]:
        """What is left of the inflow at the end of the chunk."""
        return _merged((self.x * (self.dt * self.decays.exit)[..., None]).to(self.x.dtype))


class SSDGradients(NamedTuple):
    """Of a step's arguments."""

    A: Float[Tensor, "heads"]
    state: State
    x: Float[Tensor, "batch chunks*chunk heads head_dim"]
    dt: Float[Tensor, "batch chunks*chunk heads"]
    B: Float[Tensor, "batch chunks*chunk groups state"]
    C: Float[Tensor, "batch chunks*chunk groups state"]


def _merged(values: Float[Tensor, "b c g r q p"]) -> Float[Tensor, "b c g q r*p"]:
    return rearrange(values, "b c g r q p -> b c g q (r p)")


def _split(values: Float[Tensor, "b c g q r*p"], heads: int) -> Float[Tensor, "b c g r q p"]:
    return rearrange(values, "b c g q (r p) -> b c g r q p", r=heads)


def _chunks(tokens: SSDTokens, A: Float[Tensor, "heads"], chunk: int) -> SSDChunks:
    groups = tokens.B.shape[2]
    B, C = (rearrange(values, "b (c q) g n -> b c g q n", q=chunk) for values in (tokens.B, tokens.C))
    dt = by_chunk(tokens.dt, chunk, groups)
    decays = Decays.of(dt * rearrange(A, "(g r) -> g r 1", g=groups), tokens.documents)
    return SSDChunks(by_chunk(tokens.x, chunk, groups), dt, B, C, decays, tokens.documents)


def _states(
    chunks: SSDChunks, state: State
) -> tuple[Float[Tensor, "b c g n r*p"], Float[Tensor, "b c g 1 r*p"], State]:
    """The state before each chunk, the share of it that is kept, and the state after the last."""
    added = (chunks.B.mT @ chunks.stored).to(state.dtype)
    kept = repeat(chunks.decays.across, "b c g r 1 -> b c g 1 (r p)", p=chunks.x.shape[-1])
    before = []
    for c in range(added.shape[1]):
        state = forgotten(state, chunks.documents, c)
        before.append(state)
        state = torch.addcmul(added[:, c], state, kept[:, c])
    return torch.stack(before, dim=1), kept, state


def forward(tokens: SSDTokens, A: Float[Tensor, "heads"], state: State, chunk: int) -> tuple[Tensor, State]:
    """The outputs [batch, chunks * chunk, heads, head_dim], and the state after the tokens."""
    chunks, dtype = _chunks(tokens, A, chunk), tokens.x.dtype
    decays = chunks.decays
    y = (decays.within * chunks.similarity).to(dtype) @ chunks.inflow
    before, _, state = _states(chunks, state)
    read = _split(chunks.C @ before.to(dtype), y.shape[3])
    y = torch.addcmul(y.to(state.dtype), read.to(state.dtype), decays.entry[..., None])
    return by_token(y).to(dtype), state


class _Within(NamedTuple):
    """Gradients of what happens inside chunks."""

    similarity: Float[Tensor, "b c g q q"]
    inflow: Float[Tensor, "b c g r q p"]
    log_decay: Float[Tensor, "b c g r q"]


def _backward_within(chunks: SSDChunks, grad: Float[Tensor, "b c g r q p"]) -> _Within:
    dtype, within, similarity = grad.dtype, chunks.decays.within, chunks.similarity
    weights = within * similarity
    grad_weights = grad @ chunks.inflow.mT
    decayed = grad_weights * within
    sums = decayed * similarity  # the gradient of the exponent total_i - total_j
    return _Within(
        similarity=decayed.sum(3).to(dtype),
        inflow=weights.to(dtype).mT @ grad,
        log_decay=sums.sum(-1) - sums.sum(-2),
    )


def _backward_states(
    kept: Float[Tensor, "b c g 1 r*p"], read: Float[Tensor, "b c g n r*p"], grad_state: State
) -> tuple[Float[Tensor, "b c g n r*p"], State]:
    """The gradient of the state after each chunk, and of the one before the first; `read` is what the outputs of
    each chunk want of the state before it."""
    after = []
    for c in reversed(range(read.shape[1])):
        after.append(grad_state)
        grad_state = torch.addcmul(read[:, c], grad_state, kept[:, c])
    return torch.stack(after[::-1], dim=1), grad_state


def backward(
    tokens: SSDTokens, A: Float[Tensor, "heads"], state: State, grads: tuple[Tensor, State], chunk: int
) -> SSDGradients:
    """The gradients of a step that started from `state`, from those of its outputs and of the state after it."""
    chunks, dtype, groups = _chunks(tokens, A, chunk), tokens.x.dtype, tokens.B.shape[2]
    decays, heads, precise = chunks.decays, chunks.x.shape[3], state.dtype
    grad = by_chunk(grads[0], chunk, groups)
    inner = _backward_within(chunks, grad)

    before, kept, _ = _states(chunks, state)
    reading = _merged((grad * decays.entry[..., None]).to(dtype))
    wanted = (chunks.C.mT @ reading).to(precise)
    after, grad_state = _backward_states(kept, wanted, grads[1])
    before_, after_ = before.to(dtype), after.to(dtype)

    leaving = _split(chunks.B @ after_, heads)
    grad_inflow = inner.inflow + leaving * decays.exit[..., None]
    grad_C = inner.similarity @ chunks.B + reading @ before_.mT
    grad_B = inner.similarity.mT @ chunks.C + chunks.stored @ after_.mT

    entered = _split(reading.to(precise) * (chunks.C @ before_), heads).sum(-1)
    left = (leaving * chunks.x).to(precise).sum(-1) * chunks.dt * decays.exit
    carried = reduce(before * after * kept, "b c g n (r p) -> b c g r 1", "sum", r=heads)
    grad_total = inner.log_decay + entered - left
    ended = left.sum(-1, keepdim=True) + carried  # of the total at the chunk's end, which all tokens are part of
    grad_log = grad_total.flip(-1).cumsum(-1).flip(-1) + ended
    rates = rearrange(A, "(g r) -> g r 1", g=groups)
    grad_dt = (grad_inflow * chunks.x).to(precise).sum(-1) + grad_log * rates
    return SSDGradients(
        A=reduce(grad_log * chunks.dt, "b c g r q -> (g r)", "sum"),
        state=grad_state,
        x=by_token(grad_inflow * chunks.dt[..., None]).to(dtype),
        dt=by_token(grad_dt),
        B=rearrange(grad_B, "b c g q n -> b (c q) g n").to(dtype),
        C=rearrange(grad_C, "b c g q n -> b (c q) g n").to(dtype),
    )
