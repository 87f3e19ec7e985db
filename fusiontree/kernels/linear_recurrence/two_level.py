"""`linear_recurrence` in blocks of chunks, as `selective_scan` has them (`fusiontree.kernels.common.two_level`).

The output is the state itself, so backward needs only the output and the decays: it is the same recurrence in reverse.
The operator is opaque to `torch.compile`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.documents import silence_padding
from fusiontree.kernels.common.opaque import opaque
from fusiontree.kernels.common.tiling import Tiling
from fusiontree.kernels.common.two_level import States, entering, leaving, recur
from fusiontree.kernels.linear_recurrence.op import LINEAR_RECURRENCE, LinearRecurrenceInputs


def _by_place(values: Float[Tensor, "rows tokens channels"], chunk: int) -> tuple[States, ...]:
    """Views, one for each place in a chunk."""
    return values.unflatten(1, (-1, chunk)).permute(2, 1, 0, 3).unbind()


@opaque("linear_recurrence_two_level")
def _recurrence(x: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state after each token, and once more the one after the last."""
    y, end = x.clone(memory_format=torch.contiguous_format), torch.empty_like(state)
    tiling = Tiling.of(state, x.shape[1])
    for rows in tiling.rows_at_once():
        running = state[rows]
        for span, chunk in tiling.spans():
            states, decays = (_by_place(values[rows, span], chunk) for values in (y, a))
            recur(states, decays, entering(states, decays, running))
            running = states[-1][-1]
        end[rows] = running
    return y, end


@_recurrence.register_fake
def _recurrence_shapes(x: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(state)


@torch.library.custom_op("fusiontree::linear_recurrence_two_level_backward", mutates_args=())
def _recurrence_backward(
    grad_y: Tensor, grad_end: Tensor, a: Tensor, y: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, a and the first state."""
    grad_x, grad_a = grad_y.clone(memory_format=torch.contiguous_format), torch.empty_like(y)
    grad_first, tiling = torch.empty_like(state), Tiling.of(state, y.shape[1])
    for rows in tiling.rows_at_once():
        running = grad_end[rows]
        for span, chunk in reversed(tiling.spans()):
            wanted, decays = (_by_place(values[rows, span], chunk) for values in (grad_x, a))
            wanted[-1].add_(leaving(wanted, decays, running))
            recur(wanted[-2::-1], decays[:0:-1], wanted[-1])
            running = decays[0][0] * wanted[0][0]
        grad_first[rows] = running
    torch.mul(grad_x[:, :1], state[:, None], out=grad_a[:, :1])
    torch.mul(grad_x[:, 1:], y[:, :-1], out=grad_a[:, 1:])
    return grad_x, grad_a, grad_first


@_recurrence_backward.register_fake
def _recurrence_backward_shapes(
    grad_y: Tensor, grad_end: Tensor, a: Tensor, y: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), torch.empty_like(y), torch.empty_like(state)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _, a, state = inputs
    ctx.save_for_backward(a, output[0], state)


def _propagate(ctx: Any, grad_y: Tensor, grad_end: Tensor) -> tuple[Tensor, ...]:
    return _recurrence_backward(grad_y, grad_end, *ctx.saved_tensors)


_recurrence.register_autograd(_propagate, setup_context=_keep_for_backward)


@LINEAR_RECURRENCE.backend("two_level", priority=10)
def two_level(inputs: LinearRecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Linear in time and in memory; see the module's text."""
    x, a, state, segments = inputs.prepared()
    assert state is not None
    y, end = _recurrence(x, a, state)
    return silence_padding(y.to(inputs.x.dtype), segments), end
