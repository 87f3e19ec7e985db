"""Some whole chunks of `gated_delta` at once, forward and backward, in the accumulation dtype.

Within a chunk the values N that are really written solve (I + L) N = beta (V - e K S), where S is the state before the
chunk, e the decay since then, and L = beta (K K^T * decays) below the diagonal (the WY form; DeltaNet, arXiv
2406.06484, section 3, with the decays of arXiv 2412.06464, section 3.3). Then O = e Q S + (Q K^T * decays) N, and the
chunk adds K^T N, decayed to its end, to the state. (I + L) is inverted once for all heads and chunks of a pass.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.chunks import Documents, by_chunk, by_token, forgotten
from fusiontree.kernels.gated_delta.channels import PerChannel
from fusiontree.kernels.gated_delta.decays import DeltaDecays, Keys, Logs, PerHead, Scores

State = Float[Tensor, "batch g r n p"]
States = Float[Tensor, "batch chunks g r n p"]
Values = Float[Tensor, "b c g r chunk p"]


class DeltaTokens(NamedTuple):
    """The tokens of some whole chunks, or their gradients."""

    q: Float[Tensor, "batch chunks*chunk key_heads key_dim"]
    k: Float[Tensor, "batch chunks*chunk key_heads key_dim"]
    v: Float[Tensor, "batch chunks*chunk heads value_dim"]
    g: Float[Tensor, "batch chunks*chunk heads channels"]
    beta: Float[Tensor, "batch chunks*chunk heads"]


class DeltaChunks(NamedTuple):
    """A step by chunk, key head and head of the key head (`r`; a 1 in its place is shared)."""

    q: Float[Tensor, "b c g 1 chunk n"]
    k: Float[Tensor, "b c g 1 chunk n"]
    v: Values
    beta: Float[Tensor, "b c g r chunk 1"]
    decays: DeltaDecays
    documents: Documents | None

    @classmethod
    def of(cls, tokens: DeltaTokens, documents: Documents | None, chunk: int) -> "DeltaChunks":
        """In the dtype of g."""
        groups, dtype = tokens.k.shape[2], tokens.g.dtype
        q, k, v, g, beta = (by_chunk(values.to(dtype), chunk, groups) for values in tokens)
        form = PerHead if g.shape[-1] == 1 else PerChannel
        return cls(q, k, v, beta[..., None], form.of(g, documents), documents)


class _Solved(NamedTuple):
    """Keys with keys, (I + L)^-1, and what it makes of beta V and of beta e K: the values written are U - R S."""

    similar: Scores
    inverse: Scores
    U: Values
    R: Keys


def _solved(chunks: DeltaChunks) -> _Solved:
    _, k, v, beta, decays, _ = chunks
    similar = decays.product(k, k)
    identity = torch.eye(similar.shape[-1], dtype=similar.dtype, device=similar.device)
    # Only what is below the diagonal is read.
    inverse = torch.linalg.solve_triangular(beta * similar, identity, upper=False, unitriangular=True)
    return _Solved(similar, inverse, inverse @ (beta * v), inverse @ (beta * decays.entry * k))


def _scores(chunks: DeltaChunks) -> Scores:
    return chunks.decays.product(chunks.q, chunks.k)


def _states(chunks: DeltaChunks, solved: _Solved, state: State) -> tuple[States, State]:
    """The state before each chunk, and after the last."""
    kept, across, before = (chunks.decays.exit * chunks.k).mT, chunks.decays.across, []
    for c in range(kept.shape[1]):
        state = forgotten(state, chunks.documents, c)
        before.append(state)
        written = solved.U[:, c] - solved.R[:, c] @ state
        state = across[:, c] * state + kept[:, c] @ written
    return torch.stack(before, dim=1), state


def forward(tokens: DeltaTokens, documents: Documents | None, state: State, chunk: int) -> tuple[Tensor, State]:
    """The outputs [batch, chunks * chunk, heads, value_dim], and the state after the tokens."""
    chunks = DeltaChunks.of(tokens, documents, chunk)
    solved = _solved(chunks)
    before, state = _states(chunks, solved, state)
    written = solved.U - solved.R @ before
    return by_token((chunks.decays.entry * chunks.q) @ before + _scores(chunks) @ written), state


class _Through(NamedTuple):
    """The gradients of the values written, and of the state after each chunk and before the first."""

    written: Values
    after: States
    first: State


def _through(chunks: DeltaChunks, R: Keys, wanted: tuple[Values, States], grad_state: State) -> _Through:
    """Backward between chunks; `wanted`: what the outputs want of the values written, and of the states before."""
    kept, across = chunks.decays.exit * chunks.k, chunks.decays.across
    written, after = [], []
    for c in reversed(range(kept.shape[1])):
        after.append(grad_state)
        written.append(wanted[0][:, c] + kept[:, c] @ grad_state)
        grad_state = across[:, c] * grad_state + wanted[1][:, c] - R[:, c].mT @ written[-1]
    return _Through(torch.stack(written[::-1], 1), torch.stack(after[::-1], 1), grad_state)


class _Share(NamedTuple):
    """What a part of the computation adds to the gradients; `log`: of the log decay since the chunk began."""

    q: Float[Tensor, "b c g 1 chunk n"]
    k: Float[Tensor, "b c g 1 chunk n"]
    beta: Float[Tensor, "b c g r chunk"]
    log: Logs


def _inside(chunks: DeltaChunks, similar: Scores, grad_scores: Scores, grad_system: Scores) -> _Share:
    """From the gradients of queries with keys, and of L, below the diagonal."""
    q, k, _, beta, decays, _ = chunks
    asked, met = decays.backward(grad_scores, q, k), decays.backward(beta * grad_system, k, k)
    return _Share(
        q=asked.a,
        k=asked.b + met.a + met.b,
        beta=(grad_system * similar).sum(-1),
        log=asked.log + met.log,
    )


class _Outside(NamedTuple):
    """The reads of the state before a chunk, and the writes to the state after it. `right`: the gradient of V - e K S
    after beta; `grad`: the gradient of the outputs."""

    before: States
    after: States
    written: Values
    right: Values
    grad: Values


def _outside(chunks: DeltaChunks, outside: _Outside) -> _Share:
    """From the states, and from what was written."""
    q, k, v, beta, decays, _ = chunks
    before, after, written, right, grad = outside
    met = (right * -beta) @ before.mT * decays.entry
    asked = grad @ before.mT * decays.entry
    left = written @ after.mT * decays.exit
    leaving = decays.gathered(left * k)
    carried = decays.gathered((decays.across * before * after).sum(-1)[..., None, :])
    log = decays.gathered(met * k + asked * q) - leaving
    log[..., -1:, :] += leaving.sum(-2, keepdim=True) + carried  # the decay of all tokens is in what is left at the end
    return _Share(
        q=asked.sum(3, keepdim=True),
        k=(met + left).sum(3, keepdim=True),
        beta=(right * (v - (decays.entry * k) @ before)).sum(-1),
        log=log,
    )


def backward(
    tokens: DeltaTokens, documents: Documents | None, state: State, grads: tuple[Tensor, State], chunk: int
) -> tuple[DeltaTokens, State]:
    """The gradients of a step that started from `state`, from those of its outputs and of the state after it."""
    chunks = DeltaChunks.of(tokens, documents, chunk)
    grad, solved = by_chunk(grads[0].to(chunks.v.dtype), chunk, tokens.k.shape[2]), _solved(chunks)
    before, _ = _states(chunks, solved, state)
    written = solved.U - solved.R @ before
    wanted = _scores(chunks).mT @ grad, (chunks.decays.entry * chunks.q).mT @ grad
    through = _through(chunks, solved.R, wanted, grads[1])
    right = solved.inverse.mT @ through.written
    shares = (
        _inside(chunks, solved.similar, grad @ written.mT, -(right @ written.mT).tril(-1)),
        _outside(chunks, _Outside(before, through.after, written, right, grad)),
    )
    q, k, beta, log = (one + other for one, other in zip(*shares, strict=True))
    g = log.flip(-2).cumsum(-2).flip(-2)
    return DeltaTokens(*(by_token(values) for values in (q, k, chunks.beta * right, g, beta))), through.first
