"""Some whole chunks of `selective_scan` at once, forward and backward, in the accumulation dtype.

Positions in the chunk come first: the recurrence takes one position of all chunks at a time, everything else is one
operation on the block. Channels come last, where vector instructions work. Nothing is divided, and no exponent is
positive.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.two_level import entering, leaving, recur

LOG2_E = math.log2(math.e)

Rates = Float[Tensor, "groups state r"]
State = Float[Tensor, "rows groups state r"]
States = Float[Tensor, "chunks rows groups state r"]
Elements = Float[Tensor, "chunk chunks rows groups state r"]
Channels = Float[Tensor, "chunk chunks rows groups 1 r"]
Entries = Float[Tensor, "chunk chunks rows groups state 1"]


class ScanBlock(NamedTuple):
    """The tokens of some whole chunks, `r` channels a group. `reset` is -inf where a document starts, elsewhere 0."""

    x: Channels
    dt: Channels
    B: Entries
    C: Entries
    reset: Float[Tensor, "chunk chunks rows 1 1 1"] | None


class Room:
    """Memory for one block after the other: getting it anew each time would cost as much as the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._taken: dict[tuple[str, tuple[int, ...]], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def take(self, name: str, *shape: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A tensor of this shape with anything in it, in the place of the last such one, and its slices."""
        if (name, shape) not in self._taken:
            tensor = self.like.new_empty(shape)
            self._taken[name, shape] = tensor, tensor.unbind()
        return self._taken[name, shape]


class ScanGradients(NamedTuple):
    """Of a block's arguments."""

    A: Rates
    state: State
    x: Channels
    dt: Channels
    B: Entries
    C: Entries


def _exp(block: ScanBlock, A: Rates, decays: Elements) -> None:
    """exp(dt A), and 0 where a document starts. As a power of 2, which torch has in vectors on every CPU."""
    if block.reset is None:
        torch.mul(block.dt, A * LOG2_E, out=decays)
    else:
        torch.addcmul(block.reset, block.dt, A * LOG2_E, out=decays)
    decays.exp2_()


class _Passed(NamedTuple):
    """The decays, as a whole and by position, and the states before each chunk and after each of its tokens."""

    decays: Elements
    factors: tuple[States, ...]
    states: Float[Tensor, "chunk+1 chunks rows groups state r"]


def _passed(block: ScanBlock, A: Rates, state: State, room: Room) -> _Passed:
    shape = (*block.dt.shape[:4], *A.shape[1:])
    decays, factors = room.take("decays", *shape)
    states, (before, *after) = room.take("states", shape[0] + 1, *shape[1:])
    _exp(block, A, decays)
    torch.mul(block.x * block.dt, block.B, out=states[1:])
    before.copy_(entering(after, factors, state))
    recur(after, factors, before)
    return _Passed(decays, factors, states)


def forward(block: ScanBlock, A: Rates, state: State, room: Room) -> tuple[Channels, State]:
    """The outputs, and the state after the block."""
    states = _passed(block, A, state, room).states
    return block.C.mT @ states[1:], states[-1, -1].clone()


def backward(block: ScanBlock, A: Rates, state: State, grads: tuple[Channels, State], room: Room) -> ScanGradients:
    """The gradients of a block that started from `state`, from those of its outputs and of the state after it."""
    decays, factors, states = _passed(block, A, state, room)
    adjoints, wanted = room.take("adjoints", *decays.shape)
    torch.mul(block.C, grads[0], out=adjoints)
    wanted[-1].add_(leaving(wanted, factors, grads[1]))
    recur(wanted[-2::-1], factors[:0:-1], wanted[-1])

    grad_state, grad_inflow = factors[0][0] * wanted[0][0], block.B.mT @ adjoints
    grad_B, grad_C = adjoints @ (block.x * block.dt).mT, states[1:] @ grads[0].mT
    grad_log = decays.mul_(states[:-1]).mul_(adjoints)  # of dt A
    grad_A = torch.mul(grad_log, block.dt, out=adjoints).sum((0, 1, 2))
    grad_dt = grad_log.mul_(A).sum(-2, keepdim=True).addcmul_(grad_inflow, block.x)
    return ScanGradients(grad_A, grad_state, grad_inflow * block.dt, grad_dt, grad_B, grad_C)
