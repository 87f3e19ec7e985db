"""The recurrence of Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), and with a decay for each
channel that of Kimi Delta Attention (arXiv 2510.26692)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.scan.delta import chunked, reference  # noqa: F401  (they register)
from fusiontree.kernels.scan.delta.op import GATED_DELTA, GatedDeltaInputs


def gated_delta(
    q: Float[Tensor, "batch time key_heads key_dim"],
    k: Float[Tensor, "batch time key_heads key_dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key_dim"],
    beta: Float[Tensor, "batch time heads"],
    *,
    initial_state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """S_t = A_t S_{t-1} + beta_t k_t (v_t - k_t^T A_t S_{t-1})^T with A_t = exp(g_t), and o_t = q_t^T S_t.

    Head j reads key head j // (heads / key_heads). Returns o in v's dtype, and the state after each row's last real
    token in float32 (float64 for float64). Differentiable in all floating-point arguments, through both results.

    Args:
        q: what is asked of the state, already scaled.
        k: of length 1, or at least with beta |k|^2 <= 2: beyond that the state grows without a bound.
        g: the log of the decay, <= 0: of a head's whole state, or of each channel of its keys.
        beta: how much of the error is written, in [0, 1], or up to 2 for negative eigenvalues (arXiv 2411.12537).
        initial_state: the state before the first token; None is zeros.
        segments: document boundaries, as in `fusiontree.kernels.documents`.
        backend: "auto" or one of `GATED_DELTA.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return GATED_DELTA(GatedDeltaInputs(q, k, v, g, beta, initial_state, segments), backend)


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
