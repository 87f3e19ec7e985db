"""`gated_delta` in chunks: matrix products within a chunk, the recurrence between chunks.

Some chunks are taken at a time, so that temporaries fit a cache; backward stores only the states between such steps
and makes the rest again. The operator is opaque to `torch.compile`.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fusiontree.kernels.common.chunks import Documents, spans
from fusiontree.kernels.common.documents import padding_joined, silence_padding
from fusiontree.kernels.common.opaque import opaque
from fusiontree.kernels.gated_delta import chunk_pass as steps
from fusiontree.kernels.gated_delta.chunk_pass import DeltaTokens, State
from fusiontree.kernels.gated_delta.op import GATED_DELTA, GatedDeltaInputs


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _cut(tokens: list[Tensor], span: slice) -> DeltaTokens:
    return DeltaTokens(*(tensor[:, span] for tensor in tokens))


@opaque("gated_delta_chunked")
def _scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segments: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, the state after the last token, and with `keep` the state before each step."""
    y, tokens, taken = _empty_like(v), [q, k, v, g, beta], list(spans(v))
    kept = state.new_empty(len(taken) if keep else 0, *state.shape)
    running = state.clone(memory_format=torch.contiguous_format)
    for place, (span, chunk) in enumerate(taken):
        if keep:
            kept[place] = running
        documents = Documents.of(segments, span, chunk)
        y[:, span], running = steps.forward(_cut(tokens, span), documents, running, chunk)
    return y, running, kept


@_scan.register_fake
def _scan_shapes(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, state, _, keep = others
    count = len(list(spans(v))) if keep else 0
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(count, *state.shape)


@torch.library.custom_op("fusiontree::gated_delta_chunked_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor, grad_state: Tensor, tokens: list[Tensor], kept: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first state, and of q, k, v, g and beta."""
    found = DeltaTokens(*(_empty_like(tensor) for tensor in tokens))
    running = grad_state.clone(memory_format=torch.contiguous_format)
    for place, (span, chunk) in reversed(list(enumerate(spans(grad_y)))):
        documents = Documents.of(segments, span, chunk)
        grads = grad_y[:, span], running
        own, running = steps.backward(_cut(tokens, span), documents, kept[place], grads, chunk)
        for whole, part in zip(found, own, strict=True):
            whole[:, span] = part
    q, k, v, g, beta = found
    return running, q, k, v, g, beta


@_scan_backward.register_fake
def _scan_backward_shapes(grad_y: Tensor, grad_state: Tensor, tokens: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_like(tensor) for tensor in (grad_state, *tokens))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tokens, _, segments, _ = inputs
    ctx.save_for_backward(*tokens, output[2], segments)


def _propagate(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tokens, kept, segments = ctx.saved_tensors
    first, *grads = _scan_backward(grad_y, grad_state, tokens, kept, segments)
    return *grads, first, None, None


_scan.register_autograd(_propagate, setup_context=_keep_for_backward)


@GATED_DELTA.backend("chunked", priority=10)
def chunked(inputs: GatedDeltaInputs) -> tuple[Tensor, Tensor]:
    """Linear in time and in memory; see the module's text."""
    *tokens, state, segments = inputs.prepared()
    assert state is not None
    joined = None if segments is None else padding_joined(segments)
    grouped: State = rearrange(state, "b (g r) n p -> b g r n p", g=inputs.k.shape[2])
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tokens, grouped))
    y, end, _ = _scan(*tokens, grouped, joined, keep)
    return silence_padding(y, segments), rearrange(end, "b g r n p -> b (g r) n p")
