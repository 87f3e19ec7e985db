"""`causal_conv1d` for one new token of each row."""

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype


def causal_conv1d_step(
    state: Float[Tensor, "batch taps-1 channels"],
    x: Float[Tensor, "batch 1 channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, "channels"] | None = None,
) -> Float[Tensor, "batch 1 channels"]:
    """One token of `causal_conv1d`, for decoding without gradients: `state` is brought up to date in place."""
    dtype = accumulation_dtype(x.dtype)
    window = torch.cat([state, x], 1)
    y = (window * weight.mT.to(dtype)).sum(1, keepdim=True)
    state.copy_(window.narrow(1, 1, state.shape[1]))
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)
