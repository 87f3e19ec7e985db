"""`selective_scan` in chunks: many elements an operation, but no more than a processor's cache holds.

The time is cut into blocks, one after the other. A block is one chunk, or where channels are few several chunks side by
side, so that each operation of the recurrence has enough elements to be worth its call (`block`). Backward stores only
the states between blocks and recomputes the rest. The operator is opaque to `torch.compile`.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from fusiontree.kernels.common.documents import silence_padding
from fusiontree.kernels.common.opaque import opaque
from fusiontree.kernels.common.prepared import prepared
from fusiontree.kernels.common.tiling import Tiling
from fusiontree.kernels.selective_scan import block as blocks
from fusiontree.kernels.selective_scan.block import Channels, Entries, Room, ScanBlock
from fusiontree.kernels.selective_scan.op import SELECTIVE_SCAN, SelectiveScanInputs

Grouped = Float[Tensor, "batch groups state r"]


class Tokens(NamedTuple):
    """The tokens of a call; `starts` are those before which the state is emptied."""

    x: Float[Tensor, "batch time channels"]
    dt: Float[Tensor, "batch time channels"]
    B: Float[Tensor, "batch time groups state"]
    C: Float[Tensor, "batch time groups state"]
    starts: Bool[Tensor, "batch time"] | None

    def channels(self, values: Float[Tensor, "rows tokens channels"], chunk: int) -> Channels:
        """Tokens of a block, by chunk and group."""
        pattern = "b (c q) (g r) -> q c b g 1 r"
        return rearrange(values, pattern, q=chunk, g=self.B.shape[2]).to(self.dt.dtype)

    def block(self, rows: slice, span: slice, chunk: int) -> ScanBlock:
        """The tokens of a block."""
        x, dt = (self.channels(values[rows, span], chunk) for values in (self.x, self.dt))
        B, C = (_entries(values[rows, span].to(dt.dtype), chunk) for values in (self.B, self.C))
        reset = None
        if self.starts is not None:
            starts = rearrange(self.starts[rows, span], "b (c q) -> q c b 1 1 1", q=chunk)
            reset = torch.where(starts, -torch.inf, dt.new_zeros(()))
        return ScanBlock(x, dt, B, C, reset)


def _entries(values: Float[Tensor, "rows tokens groups state"], chunk: int) -> Entries:
    return rearrange(values, "b (c q) g n -> q c b g n 1", q=chunk)


def _by_token(values: Channels) -> Float[Tensor, "rows tokens channels"]:
    return rearrange(values, "q c b g 1 r -> b (c q) (g r)")


def _entries_by_token(values: Entries) -> Float[Tensor, "rows tokens groups state"]:
    return rearrange(values, "q c b g n 1 -> b (c q) g n")


@opaque("selective_scan_two_level")
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, the state after the last token, and with `keep` the state before each block."""
    tokens, tiling, room = Tokens(x, dt, B, C, starts), Tiling.of(state, x.shape[1]), Room(state)
    y, end = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, state))
    spans = tiling.spans()
    kept = state.new_empty(len(spans) if keep else 0, *state.shape)
    for rows in tiling.rows_at_once():
        running = state[rows]
        for place, (span, chunk) in enumerate(spans):
            if keep:
                kept[place, rows] = running
            outputs, running = blocks.forward(tokens.block(rows, span, chunk), A, running, room)
            y[rows, span] = _by_token(outputs)
        end[rows] = running
    return y, end, kept


@_scan.register_fake
def _scan_shapes(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, state, _, keep = others
    count = len(Tiling.of(state, x.shape[1]).spans()) if keep else 0
    return x.new_empty(x.shape), state.new_empty(state.shape), state.new_empty(count, *state.shape)


@torch.library.custom_op("fusiontree::selective_scan_two_level_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor, grad_state: Tensor, tensors: list[Tensor], A: Tensor, kept: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of A, of the first state, and of the tokens' x, dt, B and C."""
    tokens, room = Tokens._make([*tensors, starts]), Room(grad_state)
    tiling = Tiling.of(grad_state, grad_y.shape[1])
    grad_A, grad_first = torch.zeros_like(A), torch.empty_like(grad_state, memory_format=torch.contiguous_format)
    x, dt, B, C = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    spans = tiling.spans()
    for rows in tiling.rows_at_once():
        running = grad_state[rows]
        for place, (span, chunk) in reversed(list(enumerate(spans))):
            wanted = tokens.channels(grad_y[rows, span], chunk)
            block = tokens.block(rows, span, chunk)
            grads = blocks.backward(block, A, kept[place, rows], (wanted, running), room)
            grad_A, running = grad_A + grads.A, grads.state
            x[rows, span], dt[rows, span] = _by_token(grads.x), _by_token(grads.dt)
            B[rows, span], C[rows, span] = _entries_by_token(grads.B), _entries_by_token(grads.C)
        grad_first[rows] = running
    return grad_A, grad_first, x, dt, B, C


@_scan_backward.register_fake
def _scan_backward_shapes(
    grad_y: Tensor, grad_state: Tensor, tensors: list[Tensor], A: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    like = (A, grad_state, *tensors)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, _, starts, _ = inputs
    ctx.save_for_backward(x, dt, B, C, A, output[2], starts)


def _propagate(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, A, kept, starts = ctx.saved_tensors
    grad_A, grad_first, x, dt, B, C = _scan_backward(grad_y, grad_state, tensors, A, kept, starts)
    return x, dt, grad_A, B, C, grad_first, None, None


_scan.register_autograd(_propagate, setup_context=_keep_for_backward)


@SELECTIVE_SCAN.backend("two_level", priority=10)
def two_level(inputs: SelectiveScanInputs) -> tuple[Tensor, Tensor]:
    """Linear in time and in memory; see the module's text."""
    x, dt, A, B, C, state, segments = prepared(inputs)
    assert state is not None
    groups = B.shape[2]
    rates = rearrange(A, "(g r) n -> g n r", g=groups).contiguous()
    grouped: Grouped = rearrange(state, "b (g r) n -> b g n r", g=groups)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, dt, A, B, C, grouped))
    y, end, _ = _scan(x, dt, rates, B, C, grouped, inputs.starts(), keep)
    return silence_padding(y, segments), rearrange(end, "b g n r -> b (g r) n")
