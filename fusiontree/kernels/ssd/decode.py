"""`ssd` for one new token of each row."""

import torch
from jaxtyping import Float
from torch import Tensor


def ssd_step(
    state: Float[Tensor, "batch heads head_dim state"],
    x: Float[Tensor, "batch heads head_dim"],
    dt: Float[Tensor, "batch heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch groups state"],
    C: Float[Tensor, "batch groups state"],
) -> tuple[Float[Tensor, "batch heads head_dim"], Float[Tensor, "batch heads head_dim state"]]:
    """One token of `ssd`, for decoding without gradients: `state` is updated in place and returned."""
    dt = dt.to(state.dtype)
    groups = B.shape[1]
    grouped = state.unflatten(1, (groups, -1))
    inflow = (dt[..., None] * x).unflatten(1, (groups, -1))
    grouped.mul_(torch.exp(dt * A)[..., None, None].unflatten(1, (groups, -1)))
    grouped.addcmul_(inflow[..., None], B.to(state.dtype)[:, :, None, None, :])
    y = grouped.flatten(2, 3) @ C.to(state.dtype)[..., None]
    return y.reshape(x.shape).to(x.dtype), state
