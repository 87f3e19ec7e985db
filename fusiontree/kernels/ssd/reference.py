"""`ssd` as the recurrence that defines it, one token at a time: the truth, in float64."""

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype, padding_joined, previous, silence_padding
from fusiontree.kernels.common.prepared import prepared
from fusiontree.kernels.ssd.op import SSD, SSDInputs

Heads = Float[Tensor, "batch time heads state"]


def _per_head(values: Float[Tensor, "batch time groups state"], like: Tensor) -> Heads:
    share = like.shape[2] // values.shape[2]
    return repeat(values.to(accumulation_dtype(values.dtype)), "b t g n -> b t (g share) n", share=share)


@SSD.backend("reference")
def reference(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t, all in the accumulation dtype.

    Each product is a matrix product, so that torch's FLOP counter sees 4 heads head_dim state a token.
    """
    x, dt, A, B, C, state, segments = prepared(inputs)
    assert state is not None
    B, C = _per_head(B, x), _per_head(C, x)
    decay, inflow = torch.exp(dt * A), dt[..., None] * x
    if segments is not None:
        joined = padding_joined(segments)
        decay = torch.where((joined == previous(joined))[..., None], decay, 0.0)
    outputs = []
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state + inflow[:, t, :, :, None] @ B[:, t, :, None, :]
        outputs.append((state @ C[:, t, :, :, None]).squeeze(-1))
    return silence_padding(torch.stack(outputs, dim=1).to(x.dtype), segments), state
