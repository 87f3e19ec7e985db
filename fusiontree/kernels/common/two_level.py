"""An elementwise linear recurrence over chunks that are processed side by side.

Values are one tensor for each position in a chunk, [chunks, rows, ...]. Several chunks take two passes: the first, from
zeros, gives the state that enters each chunk; the second starts from it. Nothing is divided.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

State = Float[Tensor, "rows *features"]
States = Float[Tensor, "chunks rows *features"]


def recur(values: Sequence[States], decays: Sequence[States], before: States) -> None:
    """v_i += d_i v_(i-1), in place."""
    for value, decay in zip(values, decays, strict=True):
        before = value.addcmul_(decay, before)


def entering(inflow: Sequence[States], decays: Sequence[States], state: State) -> States:
    """The state before each chunk; `state` is the one before the first. Zeros where the first decay is 0, as where a
    document begins: a factor of 0 would keep what is no number."""
    states = state[None]
    if inflow[0].shape[0] > 1:
        ends, kept = _ends(inflow, decays[1:])
        states = _between(ends, kept * decays[0], state)
    return states.masked_fill(decays[0] == 0, 0.0)


def leaving(wanted: Sequence[States], decays: Sequence[States], grad_state: State) -> States:
    """The gradient of the state after each chunk; `wanted` is what the outputs want of each token's state."""
    if wanted[0].shape[0] == 1:
        return grad_state[None]
    starts, kept = _ends(wanted[::-1], decays[:0:-1])
    return _between((starts * decays[0]).flip(0), (kept * decays[0]).flip(0), grad_state).flip(0)


def _ends(values: Sequence[States], decays: Sequence[States]) -> tuple[States, States]:
    """What `recur` would make of the last value, from the first on, and the share of the first that is in it."""
    end, kept = values[0].clone(), torch.ones_like(values[0])
    for value, decay in zip(values[1:], decays, strict=True):
        torch.addcmul(value, decay, end, out=end)
        kept.mul_(decay)
    return end, kept


def _between(ends: States, kept: States, first: State) -> States:
    """The state before each chunk, from what each adds to it and keeps of it."""
    states = [first]
    for end, share in zip(ends[:-1], kept[:-1], strict=True):
        states.append(torch.addcmul(end, share, states[-1].masked_fill(share == 0, 0.0)))
    return torch.stack(states)
