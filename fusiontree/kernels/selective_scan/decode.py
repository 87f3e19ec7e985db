"""`selective_scan` for one new token of each row."""

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.selective_scan.op import with_groups


def selective_scan_step(
    state: Float[Tensor, "batch channels state"],
    x: Float[Tensor, "batch channels"],
    dt: Float[Tensor, "batch channels"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch *groups state"],
    C: Float[Tensor, "batch *groups state"],
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels state"]]:
    """One token of `selective_scan`, for decoding without gradients: `state` is updated in place and returned."""
    B, C, dt = with_groups(B, x).to(state.dtype), with_groups(C, x).to(state.dtype), dt.to(state.dtype)
    grouped = state.unflatten(1, (B.shape[1], -1))
    inflow = (dt * x).unflatten(1, (B.shape[1], -1))
    state.mul_(torch.exp(dt[..., None] * A))
    grouped.addcmul_(inflow[..., None], B[:, :, None])
    y = grouped @ C[..., None]
    return y.reshape(x.shape).to(x.dtype), state
