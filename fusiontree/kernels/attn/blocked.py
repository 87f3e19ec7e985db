"""`attention` in blocks of queries over the slice of keys that they can see.

O(time * window) work, memory linear in time, and one (block x keys) mask at a time. Own backward: autograd
through slices would fill a whole gradient for each, which is quadratic again.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.attn.blocks import FLASH_CPU, PRODUCT, Block, Saved
from fusiontree.kernels.attn.op import ATTENTION, AttentionInputs, AttentionRequest, sight
from fusiontree.kernels.documents import silence_padding, wide

QUERIES = 128
KERNELS = {"product": PRODUCT, "flash_cpu": FLASH_CPU}


class Options(NamedTuple):
    """What is not a tensor."""

    window: int | None
    kernel: str
    scale: float
    softcap: float | None


def _fold(queries: Float[Tensor, "b t heads d"], kv_heads: int) -> Float[Tensor, "b kv_heads t*share d"]:
    return rearrange(queries, "b t (hk share) d -> b hk (t share) d", hk=kv_heads)


def _unfold(rows: Float[Tensor, "b kv_heads t*share d"], time: int) -> Float[Tensor, "b t heads d"]:
    return rearrange(rows, "b hk (t share) d -> b t (hk share) d", t=time)


@lru_cache(maxsize=64)
def _band(queries: int, keys: int, window: int | None, share: int, like: tuple[torch.dtype, torch.device]) -> Tensor:
    """The bias of the last `queries` of `keys` tokens in one document; few differ, and all layers have the same."""
    seen = sight(keys, None, None, window, like[1])
    return seen.bias(slice(keys - queries, keys), slice(0, keys), share, like[0])


def _blocks(
    tensors: tuple[Tensor, Tensor, Tensor], segments: Tensor | None, age: Tensor | None, options: Options
) -> Iterator[tuple[slice, slice, Block]]:
    q, k, v = tensors
    kv_heads, window = k.shape[2], options.window
    share, seen = q.shape[2] // kv_heads, sight(q.shape[1], segments, age, window, q.device)
    for queries, keys, plain in seen.blocks(QUERIES):
        if plain:
            sizes = queries.stop - queries.start, keys.stop - keys.start
            bias = _band(*sizes, window, share, (q.dtype, q.device))
        else:
            bias = seen.bias(queries, keys, share, q.dtype)
        rows = _fold(q[:, queries], kv_heads)
        seen_k, seen_v = k[:, keys].transpose(1, 2), v[:, keys].transpose(1, 2)
        yield queries, keys, Block(rows, seen_k, seen_v, bias, options.scale, options.softcap)


@torch.library.custom_op("fusiontree::attention_blocked", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """The output, and the log of the sum of exponentials of each folded row; cached keys come first."""
    y, sums = q.new_empty(*q.shape[:3], v.shape[-1]), []
    options = Options(window, kernel, scale, softcap)
    for queries, _, block in _blocks((q, k, v), segments, age, options):
        rows, lse = KERNELS[kernel].forward(block)
        y[:, queries] = _unfold(rows, queries.stop - queries.start)
        sums.append(lse)
    return y, torch.cat(sums, dim=-1)


@_attend.register_fake
def _(q, k, v, *options):  # noqa: ANN001, ANN002, ANN202
    batch, time, heads, _ = q.shape
    rows = (batch, k.shape[2], time * heads // k.shape[2])
    return q.new_empty(batch, time, heads, v.shape[-1]), q.new_empty(rows, dtype=wide(q.dtype))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; scores are made again."""
    kv_heads, share, dtype = k.shape[2], q.shape[2] // k.shape[2], wide(k.dtype)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    options = Options(window, kernel, scale, softcap)
    for queries, keys, block in _blocks((q, k, v), segments, age, options):
        sums = lse[..., queries.start * share : queries.stop * share]
        saved = Saved(_fold(y[:, queries], kv_heads), sums, _fold(grad[:, queries], kv_heads))
        rows, part_k, part_v = KERNELS[kernel].backward(block, saved)
        grad_q[:, queries] = _unfold(rows, queries.stop - queries.start)
        grad_k[:, keys] += part_k.transpose(1, 2)
        grad_v[:, keys] += part_v.transpose(1, 2)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_attend_backward.register_fake
def _(grad, y, lse, q, k, v, *options):  # noqa: ANN001, ANN002, ANN202
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))


def _keep_for_backward(ctx, inputs, output) -> None:  # noqa: ANN001
    q, k, v, segments, age, *ctx.options = inputs
    ctx.save_for_backward(*output, q, k, v, segments, age)


def _propagate(ctx, grad: Tensor, _):  # noqa: ANN001, ANN202
    return *_attend_backward(grad, *ctx.saved_tensors, *ctx.options), *(None for _ in range(6))


_attend.register_autograd(_propagate, setup_context=_keep_for_backward)


def _run(inputs: AttentionInputs, kernel: str) -> Float[Tensor, "batch time heads value_dim"]:
    keys, values = inputs.all_keys()
    age = None if inputs.past is None else inputs.past.age
    options = Options(inputs.window, kernel, inputs.scale, inputs.softcap)
    y, _ = _attend(inputs.q, keys, values, inputs.segments, age, *options)
    return silence_padding(y, inputs.segments)


def flash_refusal(request: AttentionRequest) -> str | None:
    """Why torch's fused CPU kernel cannot serve, or None."""
    if request.device != "cpu":
        return f"torch's fused CPU kernel does not run on {request.device}"
    if request.softcap:
        return "torch's fused kernel has no softcap"
    return None if request.equal_widths else "torch's fused kernel wants value_dim = head_dim"


@ATTENTION.backend("blocked", priority=10)
def blocked(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Each block by matrix products with a softmax in the wide dtype: serves everything, everywhere."""
    return _run(inputs, "product")


@ATTENTION.backend("blocked_flash", priority=20, supports=flash_refusal)
def blocked_flash(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Each block by torch's fused CPU kernel."""
    return _run(inputs, "flash_cpu")
