"""`attention` one query at a time: the truth, in float64."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs
from fusiontree.kernels.attention.visibility import BiasLayout
from fusiontree.kernels.common.documents import accumulation_dtype, silence_padding


def _per_query_head(values: Float[Tensor, "b t kv_heads d"], heads: int) -> Float[Tensor, "b heads t d"]:
    share = heads // values.shape[2]
    return repeat(values.to(accumulation_dtype(values.dtype)), "b t hk d -> b (hk share) t d", share=share)


def _reached(keys: Float[Tensor, "b heads s d"], reach: slice, before: Int[Tensor, "#b prefix"] | None) -> Tensor:
    """The keys in reach, behind the prefix that is not."""
    if before is None:
        return keys[:, :, reach]
    index = before[:, None, :, None].expand(len(keys), keys.shape[1], -1, keys.shape[-1])
    return torch.cat([keys.gather(2, index), keys[:, :, reach]], 2)


def _one_query(
    q: Float[Tensor, "b heads 1 d"],
    k: Tensor,
    v: Tensor,
    bias: Float[Tensor, "#b #heads 1 s"],
    inputs: AttentionInputs,
) -> Float[Tensor, "b heads 1 value_dim"]:
    scores = inputs.scale * (q @ k.mT)
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    return (scores + bias).softmax(-1) @ v


@ATTENTION.backend("reference")
def reference(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """Softmax over the keys that each query sees, in the accumulation dtype.

    Only keys in reach are multiplied: without segments and past, torch's FLOP counter sees
    2 heads (head_dim + value_dim) sum_t min(t + 1, window).
    """
    keys, values = inputs.all_keys()
    heads, visibility = inputs.q.shape[2], inputs.visibility()
    layout = BiasLayout(1, accumulation_dtype(inputs.q.dtype), inputs.slopes)
    q = rearrange(inputs.q.to(accumulation_dtype(inputs.q.dtype)), "b t h d -> b h t d")
    k, v = _per_query_head(keys, heads), _per_query_head(values, heads)
    outputs = []
    for one, reach, _ in visibility.blocks(1):
        bias, before = visibility.bias(one, reach, layout), visibility.prefix_before(one, reach)
        outputs.append(_one_query(q[:, :, one], _reached(k, reach, before), _reached(v, reach, before), bias, inputs))
    y = rearrange(torch.cat(outputs, dim=2), "b h t d -> b t h d")
    return silence_padding(y.to(inputs.q.dtype), inputs.segments)
