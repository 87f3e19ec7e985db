"""The operator `causal_conv1d`: its arguments, and what the choice of a backend depends on."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.common.shapes import Shapes
from fusiontree.kernels.common.untraced import Untraced
from fusiontree.kernels.registry import Op


class ConvRequest(NamedTuple):
    """The properties of a call of `causal_conv1d` that decide which backends serve it."""

    device: str
    dtype: torch.dtype
    segments: bool
    taps: int
    eights: bool
    """The channels are a multiple of eight."""


class ConvInputs(NamedTuple):
    """The arguments of `causal_conv1d`; `segments` as in `fusiontree.kernels.common.documents`."""

    x: Float[Tensor, "batch time channels"]
    weight: Float[Tensor, "channels taps"]
    bias: Float[Tensor, "channels"] | None
    initial_state: Float[Tensor, "batch taps-1 channels"] | None
    segments: Int[Tensor, "batch time"] | None

    @property
    def request(self) -> ConvRequest:
        """See `registry.Inputs`."""
        return ConvRequest(
            device=self.x.device.type,
            dtype=self.x.dtype,
            segments=self.segments is not None,
            taps=self.weight.shape[1],
            eights=self.x.shape[2] % 8 == 0,
        )

    def results(self) -> list[Tensor]:
        """See `untraced.Shaped`."""
        batch, _, channels = self.x.shape
        return [self.x.new_empty(self.x.shape), self.x.new_empty(batch, self.weight.shape[1] - 1, channels)]

    def history(self) -> Float[Tensor, "batch taps-1 channels"]:
        """The inputs before the first one: the initial state, or zeros."""
        if self.initial_state is not None:
            return self.initial_state.to(self.x.dtype)
        return self.x.new_zeros(self.x.shape[0], self.weight.shape[1] - 1, self.x.shape[2])


CONV: Op[ConvInputs] = Op("causal_conv1d", Shapes(ConvInputs))
untraced = Untraced("causal_conv1d_untraced", ConvInputs)
"""Decorates backends that `torch.compile` cannot look into."""


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
        segments: document boundaries, as in `fusiontree.kernels.common.documents`.
        backend: "auto" or one of `CONV.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return CONV(ConvInputs(x, weight, bias, initial_state, segments), backend)
