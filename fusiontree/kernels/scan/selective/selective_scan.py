"""The selective state-space recurrence of Mamba-1, S6 (Gu and Dao 2023, arXiv 2312.00752)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.scan.selective import mamba_ssm, reference, two_level  # noqa: F401  (they register)
from fusiontree.kernels.scan.selective.op import SELECTIVE_SCAN, SelectiveScanInputs


def _grouped(values: Tensor, x: Tensor) -> Tensor:
    return values if values.ndim > x.ndim else values.unsqueeze(-2)


def selective_scan(
    x: Float[Tensor, "batch time channels"],
    dt: Float[Tensor, "batch time channels"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch time *groups state"],
    C: Float[Tensor, "batch time *groups state"],
    *,
    initial_state: Float[Tensor, "batch channels state"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels state"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = h_t . C_t, each channel by itself.

    Returns y in x's dtype, and the state after each row's last real token in float32 (float64 for float64).
    Differentiable in all floating-point arguments, through both results.

    Args:
        dt: step sizes, >= 0, after softplus.
        A: negative rates, one for each entry of each channel's state.
        B: what all channels write by, or those of a group: channel j reads group j // (channels / groups).
        C: what they read by, likewise.
        initial_state: the state before the first token; None is zeros.
        segments: document boundaries, as in `fusiontree.kernels.documents`.
        backend: "auto" or one of `SELECTIVE_SCAN.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    B, C = _grouped(B, x), _grouped(C, x)
    return SELECTIVE_SCAN(SelectiveScanInputs(x, dt, A, B, C, initial_state, segments), backend)


def selective_scan_step(
    state: Float[Tensor, "batch channels state"],
    x: Float[Tensor, "batch channels"],
    dt: Float[Tensor, "batch channels"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch *groups state"],
    C: Float[Tensor, "batch *groups state"],
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels state"]]:
    """One token of `selective_scan`, for decoding without gradients: `state` is updated in place and returned."""
    B, C, dt = _grouped(B, x).to(state.dtype), _grouped(C, x).to(state.dtype), dt.to(state.dtype)
    grouped = state.unflatten(1, (B.shape[1], -1))
    inflow = (dt * x).unflatten(1, (B.shape[1], -1))
    state.mul_(torch.exp(dt[..., None] * A))
    grouped.addcmul_(inflow[..., None], B[:, :, None])
    y = grouped @ C[..., None]
    return y.reshape(x.shape).to(x.dtype), state
