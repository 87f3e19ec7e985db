"""`attention` in blocks of queries over the slice of keys that they can see.

O(time * window) work, memory linear in time, and one (block x keys) mask at a time. Own backward: autograd
through slices would fill a whole gradient for each, which is quadratic again.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.attention.block_kernels import FLASH_CPU, PRODUCT, AttentionBlock, Saved, flash_refusal
from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs
from fusiontree.kernels.attention.visibility import BiasLayout, Visibility, visibility_of
from fusiontree.kernels.common.documents import accumulation_dtype, silence_padding
from fusiontree.kernels.common.opaque import opaque
from fusiontree.products import operand_dtype

QUERIES = 128
LARGEST_BAND = 2**19
"""The most elements of a bias that is kept for other calls; without a window biases grow with time."""
KERNELS = {"product": PRODUCT, "flash_cpu": FLASH_CPU}


class BlockedOptions(NamedTuple):
    """What is not a tensor."""

    window: int | None
    kernel: str
    scale: float
    softcap: float | None
    prefix: int
    slopes: tuple[float, ...] | None

    @property
    def reach(self) -> tuple[int | None, int]:
        """The window, which hides keys, and the number of prefix keys, which stay visible."""
        return self.window, self.prefix


def _fold(queries: Float[Tensor, "b t heads d"], kv_heads: int) -> Float[Tensor, "b kv_heads t*queries_per_kv d"]:
    return rearrange(queries, "b t (hk share) d -> b hk (t share) d", hk=kv_heads).contiguous()


def _unfold(rows: Float[Tensor, "b kv_heads t*queries_per_kv d"], time: int) -> Float[Tensor, "b t heads d"]:
    return rearrange(rows, "b hk (t share) d -> b t (hk share) d", t=time).contiguous()


def _leading(heads: Float[Tensor, "b kv_heads t d"]) -> Float[Tensor, "b t kv_heads d"]:
    return heads.transpose(1, 2).contiguous()


@lru_cache(maxsize=32)
def _band(queries: int, keys: int, reach: tuple[int | None, int], layout: BiasLayout, device: torch.device) -> Tensor:
    """The mask bias of the last `queries` of `keys` tokens in one document. It is cached: layers share it."""
    seen = visibility_of(keys, None, None, reach, device)
    return seen.bias(slice(keys - queries, keys), slice(0, keys), layout)


def _band_size(keys: int, window: int | None) -> int:
    """The keys of the band that serves a block of so many, which is the last rows and columns of it."""
    whole = max(QUERIES, 1 << (keys - 1).bit_length())
    return whole if window is None else min(whole, window + QUERIES - 1)


class Span(NamedTuple):
    """A range of consecutive keys, with the indices of prefix keys before it."""

    keys: slice
    before: Int[Tensor, "#batch prefix"] | None

    def of(self, tensor: Float[Tensor, "batch kv_heads all_keys d"]) -> Float[Tensor, "batch kv_heads keys d"]:
        """The span's part of a tensor."""
        found = tensor[:, :, self.keys]
        return found if self.before is None else torch.cat([tensor.gather(2, self._index(tensor)), found], 2)

    def add(self, total: Float[Tensor, "batch kv_heads all_keys d"], part: Tensor) -> None:
        """Add the span's gradients to the gradients of all keys."""
        if self.before is not None:
            count = self.before.shape[1]
            total.scatter_add_(2, self._index(total), part[:, :, :count].to(total.dtype))
            part = part[:, :, count:]
        total[:, :, self.keys] += part

    def _index(self, tensor: Tensor) -> Tensor:
        assert self.before is not None
        return self.before[:, None, :, None].expand(len(tensor), tensor.shape[1], -1, tensor.shape[-1])


class QueryBlocks:
    """The queries of a call in blocks, each with the keys that it sees; all tensors with heads before time, queries
    folded into rows of their kv head. Blocks have the dtype that is multiplied in (see `products`)."""

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor], segments: Tensor | None, age: Tensor | None) -> None:
        q, k, v = tensors
        self.time, self.kv_heads = q.shape[1], k.shape[2]
        self.queries_per_kv = q.shape[2] // self.kv_heads
        self.segments, self.age = segments, age
        self.dtype = operand_dtype(q)
        self.q, self.k, self.v = _fold(q, self.kv_heads), _leading(k).to(self.dtype), _leading(v).to(self.dtype)

    def over(self, options: BlockedOptions) -> Iterator[tuple[slice, Span, AttentionBlock]]:
        """The rows of some queries, the keys that they see, and both with their bias."""
        seen = visibility_of(self.time, self.segments, self.age, options.reach, self.q.device)
        for queries, keys, plain in seen.blocks(QUERIES):
            rows = slice(queries.start * self.queries_per_kv, queries.stop * self.queries_per_kv)
            span = Span(keys, seen.prefix_before(queries, keys))
            bias = self._bias(seen, (queries, keys), options, plain)
            q = self.q[:, :, rows].to(self.dtype)
            yield rows, span, AttentionBlock(q, span.of(self.k), span.of(self.v), bias, options.scale, options.softcap)

    def _bias(self, seen: Visibility, block: tuple[slice, slice], options: BlockedOptions, plain: bool) -> Tensor:
        queries, keys = block
        (rows, columns), prefix = (queries.stop - queries.start, keys.stop - keys.start), options.prefix
        falls, layout = options.slopes is not None, BiasLayout(self.queries_per_kv, self.dtype, options.slopes)
        cut = self.segments is not None or 0 < keys.start < prefix  # a prefix that is not wholly on one side
        size = _band_size(columns, options.window)
        elements = QUERIES * size * self.queries_per_kv * (self.kv_heads if falls else 1)
        if not plain or (prefix and (cut or falls)) or elements > LARGEST_BAND:
            return seen.bias(queries, keys, layout)
        if not prefix:
            band = _band(QUERIES, size, options.reach, layout, self.q.device)
            return band[..., -rows * self.queries_per_kv :, -columns:]
        before = prefix if keys.start else 0
        band = _band(rows, columns, (options.window, prefix - before), layout, self.q.device)
        return F.pad(band, (before, 0)) if before else band


@opaque("attention_blocked")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    age: Tensor | None,
    window: int | None,
    kernel: str,
    scale: float,
    softcap: float | None,
    prefix: int,
    slopes: Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the log of the sum of exponentials of each folded row; cached keys come first."""
    blocks, sums = QueryBlocks((q, k, v), segments, age), []
    y = blocks.q.new_empty(*blocks.q.shape[:3], v.shape[-1])
    options = BlockedOptions(window, kernel, scale, softcap, prefix, None if slopes is None else tuple(slopes))
    for rows, _, block in blocks.over(options):
        y[:, :, rows], lse = KERNELS[kernel].forward(block)
        sums.append(lse)
    return _unfold(y, blocks.time), torch.cat(sums, dim=-1)


@_attend.register_fake
def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q.shape
    rows = (batch, k.shape[2], time * heads // k.shape[2])
    return q.new_empty(batch, time, heads, v.shape[-1]), q.new_empty(rows, dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("fusiontree::attention_blocked_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    age: Tensor | None,
    window: int | None,
    kernel: str,
    scale: float,
    softcap: float | None,
    prefix: int,
    slopes: Sequence[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; scores are made again."""
    blocks, dtype = QueryBlocks((q, k, v), segments, age), accumulation_dtype(k.dtype)
    options = BlockedOptions(window, kernel, scale, softcap, prefix, None if slopes is None else tuple(slopes))
    grad, y = _fold(grad, blocks.kv_heads), _fold(y, blocks.kv_heads)
    grads = [torch.zeros_like(tensor, dtype=dtype) for tensor in (blocks.q, blocks.k, blocks.v)]
    for rows, span, block in blocks.over(options):
        saved = Saved(y[:, :, rows].to(blocks.dtype), lse[..., rows], grad[:, :, rows].to(blocks.dtype))
        for total, part, at in zip(
            grads, KERNELS[kernel].backward(block, saved), (Span(rows, None), span, span), strict=True
        ):
            at.add(total, part)
    grad_q, grad_k, grad_v = grads
    return _unfold(grad_q, blocks.time).to(q.dtype), _leading(grad_k).to(k.dtype), _leading(grad_v).to(v.dtype)


@_attend_backward.register_fake
def _attend_backward_shapes(
    grad: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, age, *ctx.options = inputs
    ctx.save_for_backward(*output, q, k, v, segments, age)


def _propagate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad, *ctx.saved_tensors, *ctx.options), *(None for _ in range(8))


_attend.register_autograd(_propagate, setup_context=_keep_for_backward)


def _run(inputs: AttentionInputs, kernel: str) -> Float[Tensor, "batch time heads value_dim"]:
    keys, values = inputs.all_keys()
    age = None if inputs.past is None else inputs.past.age
    options = BlockedOptions(inputs.window, kernel, inputs.scale, inputs.softcap, inputs.prefix, inputs.slopes)
    y, _ = _attend(inputs.q, keys, values, inputs.segments, age, *options)
    return silence_padding(y, inputs.segments)


@ATTENTION.backend("blocked", priority=10)
def blocked(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Each block by matrix products with a softmax in the accumulation dtype: serves everything, everywhere."""
    return _run(inputs, "product")


@ATTENTION.backend("blocked_flash", priority=20, supports=flash_refusal)
def blocked_flash(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Each block by torch's fused CPU kernel."""
    return _run(inputs, "flash_cpu")
