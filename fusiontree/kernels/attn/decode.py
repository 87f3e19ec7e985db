"""`attention` for one query and a cache: nothing of the cache is copied, repeated or concatenated."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from fusiontree.kernels.attn.blocked import flash_refusal
from fusiontree.kernels.attn.blocks import FLASH_CPU, PRODUCT, Block, BlockKernel, capped
from fusiontree.kernels.attn.op import ATTENTION, AttentionInputs, AttentionRequest
from fusiontree.kernels.documents import silence_padding, wide


def _refusal(request: AttentionRequest) -> str | None:
    if not request.one_query:
        return "only for one query"
    return "has no gradients" if request.gradients else None


def _flash_refusal(request: AttentionRequest) -> str | None:
    return _refusal(request) or flash_refusal(request)


def _visible(inputs: AttentionInputs) -> Bool[Tensor, "batch cached"]:
    assert inputs.past is not None
    age = inputs.past.age
    seen = age > 0 if inputs.window is None else (age > 0) & (age < inputs.window)
    return seen if inputs.segments is None else seen & (inputs.segments == 0)


def _cached(
    q: Float[Tensor, "batch kv_heads share head_dim"], inputs: AttentionInputs, kernel: BlockKernel
) -> tuple[Float[Tensor, "batch kv_heads share value_dim"], Float[Tensor, "batch kv_heads share"]]:
    """Attention over the cached keys alone, and its log of the sum of exponentials."""
    assert inputs.past is not None
    seen = _visible(inputs)
    blind = ~seen.any(-1)
    bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen & ~blind[:, None], -torch.inf)
    k, v = (rearrange(cached, "b c hk d -> b hk c d").to(q.dtype) for cached in inputs.past[:2])
    rows = bias[:, None, None].expand(-1, 1, q.shape[2], -1)
    y, lse = kernel.forward(Block(q, k, v, rows, inputs.scale, inputs.softcap))
    # A query that sees nothing was shown everything, for a finite result that then has no weight.
    return y, lse.masked_fill(blind[:, None, None], -torch.inf)


def _run(inputs: AttentionInputs, kernel: BlockKernel) -> Float[Tensor, "batch 1 heads value_dim"]:
    q = rearrange(inputs.q, "b 1 (hk share) d -> b hk share d", hk=inputs.k.shape[2])
    k, v = (rearrange(own, "b 1 hk d -> b hk 1 d").to(wide(q.dtype)) for own in (inputs.k, inputs.v))
    y = v.expand(-1, -1, q.shape[2], -1)
    if inputs.past is not None and inputs.past.age.shape[1]:
        before, lse = _cached(q, inputs, kernel)
        own = capped(inputs.scale * (q * k).sum(-1), inputs.softcap)
        y = torch.lerp(y, before.to(y.dtype), torch.sigmoid(lse - own)[..., None])
    y = rearrange(y, "b hk share d -> b 1 (hk share) d").to(inputs.q.dtype)
    return silence_padding(y, inputs.segments)


@ATTENTION.backend("decode", priority=40, supports=_refusal)
def decode(inputs: AttentionInputs) -> Float[Tensor, "batch 1 heads value_dim"]:
    """The cached keys by matrix products, joined with the query's own key."""
    return _run(inputs, PRODUCT)


@ATTENTION.backend("decode_flash", priority=50, supports=_flash_refusal)
def decode_flash(inputs: AttentionInputs) -> Float[Tensor, "batch 1 heads value_dim"]:
    """The cached keys by torch's fused CPU kernel, joined with the query's own key."""
    return _run(inputs, FLASH_CPU)
