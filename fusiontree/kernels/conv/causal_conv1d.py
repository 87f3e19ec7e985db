"""The short depthwise convolution in front of a state-space layer (Gu and Dao 2023, arXiv 2312.00752)."""

from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.conv import reference, shifted  # noqa: F401  (they register)
from fusiontree.kernels.conv.op import CONV, ConvInputs


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
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return CONV(ConvInputs(x, weight, bias, initial_state, segments), backend)
