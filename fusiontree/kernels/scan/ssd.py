"""The selective state-space recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.scan import chunked, fla, mamba_ssm, reference  # noqa: F401  (they register)
from fusiontree.kernels.scan.op import SSD, SSDInputs


def ssd(
    x: Float[Tensor, "batch time heads head_dim"],
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch time groups state"],
    C: Float[Tensor, "batch time groups state"],
    *,
    initial_state: Float[Tensor, "batch heads head_dim state"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time heads head_dim"], Float[Tensor, "batch heads head_dim state"]]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t; head j reads group j // (heads / groups).

    Returns y in x's dtype, and the state after each row's last real token in float32 (float64 for float64).
    Differentiable in all floating-point arguments, through both results.

    Args:
        dt: step sizes, >= 0, after softplus and clamping.
        A: negative rates.
        initial_state: the state before the first token; None is zeros.
        segments: document boundaries, as in `fusiontree.kernels.documents`.
        backend: "auto" or one of `SSD.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return SSD(SSDInputs(x, dt, A, B, C, initial_state, segments), backend)


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
