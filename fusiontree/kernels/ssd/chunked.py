"""`ssd` in chunks: matrix products within a chunk, the recurrence between chunks.

The dual form of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 6). Some chunks are taken at a time, so that
temporaries fit a cache; backward stores only the states between such steps and makes the rest again. The operator
is opaque to `torch.compile`: a compiled model calls it as it is, and then its steps are compiled as well.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fusiontree.compiling import piece
from fusiontree.kernels.common.chunks import Documents, spans
from fusiontree.kernels.common.documents import padding_joined, silence_padding
from fusiontree.kernels.common.opaque import opaque
from fusiontree.kernels.common.prepared import prepared
from fusiontree.kernels.ssd import chunk_pass as steps
from fusiontree.kernels.ssd.chunk_pass import SSDTokens, State
from fusiontree.kernels.ssd.op import SSD, SSDInputs
from fusiontree.products import operand_dtype


def _cut(tokens: list[Tensor], segments: Tensor | None, span: slice, chunk: int) -> SSDTokens:
    """The tokens of a step, in the dtype that is multiplied in."""
    x, dt, B, C = (tensor[:, span] for tensor in tokens)
    dtype = operand_dtype(x)
    return SSDTokens(x.to(dtype), dt, B.to(dtype), C.to(dtype), Documents.of(segments, span, chunk))


@opaque("ssd_chunked")
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    segments: Tensor | None,
    keep: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, the state after the last token, and with `keep` the state before each step."""
    forward, tokens = piece(steps.forward, compiled), [tensor.detach() for tensor in (x, dt, B, C)]
    A, state = A.detach(), state.contiguous()  # one compiled form, with and without gradients, for every step
    y, states = torch.empty_like(x, memory_format=torch.contiguous_format), []
    for span, chunk in spans(x):
        if keep:
            states.append(state)
        y[:, span], state = forward(_cut(tokens, segments, span, chunk), A, state, chunk)
    return y, state, torch.stack(states) if keep else state.new_empty(0)


@_scan.register_fake
def _scan_shapes(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, state, _, keep, _ = others
    count = len(list(spans(x)))
    states = state.new_empty(count, *state.shape) if keep else state.new_empty(0)
    return x.new_empty(x.shape), state.new_empty(state.shape), states


@torch.library.custom_op("fusiontree::ssd_chunked_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    tokens: list[Tensor],
    A: Tensor,
    states: Tensor,
    segments: Tensor | None,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of A, of the first state, and of the tokens' x, dt, B and C."""
    backward = piece(steps.backward, compiled)
    grad_A, grad_state = torch.zeros_like(A), grad_state.contiguous()
    x, dt, B, C = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tokens)
    steps_taken = list(spans(x))
    for index in reversed(range(len(steps_taken))):
        span, chunk = steps_taken[index]
        step = _cut(tokens, segments, span, chunk)
        arriving = (grad_y[:, span].to(step.x.dtype), grad_state)
        grads = backward(step, A, states[index], arriving, chunk)
        grad_A, grad_state = grad_A + grads.A, grads.state
        x[:, span], dt[:, span], B[:, span], C[:, span] = grads.x, grads.dt, grads.B, grads.C
    return grad_A, grad_state, x, dt, B, C


@_scan_backward.register_fake
def _scan_backward_shapes(
    grad_y: Tensor, grad_state: Tensor, tokens: list[Tensor], A: Tensor, states: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    like = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tokens]
    return torch.empty_like(A), states.new_empty(states.shape[1:]), *like


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, _, segments, _, compiled = inputs
    ctx.save_for_backward(x, dt, B, C, A, output[2], segments)
    ctx.compiled = compiled


def _propagate(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tokens, A, states, segments = ctx.saved_tensors
    grad_A, grad_first, x, dt, B, C = _scan_backward(
        grad_y.contiguous(), grad_state, tokens, A, states, segments, ctx.compiled
    )
    return x, dt, grad_A, B, C, grad_first, None, None, None


_scan.register_autograd(_propagate, setup_context=_keep_for_backward)


@SSD.backend("chunked", priority=10)
def chunked(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """Linear in time and in memory; see the module's text."""
    x, dt, A, B, C, state, segments = prepared(inputs)
    assert state is not None
    joined = None if segments is None else padding_joined(segments)
    grouped: State = rearrange(state, "b (g r) p n -> b g n (r p)", g=B.shape[2])
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, dt, A, B, C, grouped))
    y, end, _ = _scan(x, dt, A, B, C, grouped, joined, keep, torch.compiler.is_compiling())
    final = rearrange(end, "b g n (r p) -> b (g r) p n", p=x.shape[-1])
    return silence_padding(y, segments), final
