"""`gated_delta` for one new token of each row."""

import torch
from jaxtyping import Float
from torch import Tensor


def gated_delta_step(
    state: Float[Tensor, "batch heads key_dim value_dim"],
    q: Float[Tensor, "batch key_heads key_dim"],
    k: Float[Tensor, "batch key_heads key_dim"],
    v: Float[Tensor, "batch heads value_dim"],
    g: Float[Tensor, "batch heads"] | Float[Tensor, "batch heads key_dim"],
    beta: Float[Tensor, "batch heads"],
) -> tuple[Float[Tensor, "batch heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """One token of `gated_delta`, for decoding without gradients: `state` is updated in place and returned."""
    groups, dtype = k.shape[1], state.dtype
    grouped = state.unflatten(1, (groups, -1))
    asked, key = (values.to(dtype)[:, :, None, None] for values in (q, k))
    new, rate = (values.to(dtype).unflatten(1, (groups, -1)) for values in (v, beta))
    decay = torch.exp(g.to(dtype))
    state.mul_(decay.view(*decay.shape, *[1] * (state.ndim - decay.ndim)))
    error = new[..., None, :] - key @ grouped
    grouped.addcmul_(key.mT, rate[..., None, None] * error)
    return (asked @ grouped).reshape(v.shape).to(v.dtype), state
