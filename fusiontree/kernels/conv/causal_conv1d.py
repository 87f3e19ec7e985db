"""The short depthwise convolution in front of a state-space layer (Gu and Dao 2023, arXiv 2312.00752)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.conv import causal_conv1d_cuda, fla, reference, shifted  # noqa: F401  (they register)
from fusiontree.kernels.conv.op import CONV, ConvInputs
from fusiontree.kernels.documents import wide


def causal_conv1d(
    x: Float[Tensor, "batch time channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, "channels"] | None = None,
    *,
    initial_state: Float[Tensor, "batch taps-1 channels"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch taps-1 channels"]]:
    """y_t = bias + sum_i weight_i x_{t - taps + 1 + i}, each channel by itself, no activation.

    Returns y, and the last taps-1 real inputs of each row's last document, oldest first, with zeros before
    its start. Differentiable in all floating-point arguments, through both results.

    Args:
        weight: the last tap is the current token's.
        initial_state: the inputs before the first one, oldest first; None is zeros.
        segments: document boundaries, as in `fusiontree.kernels.documents`.
        backend: "auto" or one of `CONV.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return CONV(ConvInputs(x, weight, bias, initial_state, segments), backend)


def causal_conv1d_step(
    state: Float[Tensor, "batch taps-1 channels"],
    x: Float[Tensor, "batch 1 channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, "channels"] | None = None,
) -> Float[Tensor, "batch 1 channels"]:
    """One token of `causal_conv1d`, for decoding without gradients: `state` is brought up to date in place."""
    dtype = wide(x.dtype)
    window = torch.cat([state, x], 1)
    y = (window * weight.mT.to(dtype)).sum(1, keepdim=True)
    state.copy_(window.narrow(1, 1, state.shape[1]))
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)
