"""The operator `ssd`: its arguments, and what the choice of a backend depends on."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype
from fusiontree.kernels.common.shapes import Shapes
from fusiontree.kernels.common.untraced import Untraced
from fusiontree.kernels.registry import Op


class SSDRequest(NamedTuple):
    """What is asked of a backend of `ssd`."""

    device: str
    dtype: torch.dtype
    segments: bool
    gradients: bool
    even: bool
    """head_dim and state are."""


class SSDInputs(NamedTuple):
    """The arguments of `ssd`; `segments` as in `fusiontree.kernels.common.documents`."""

    x: Float[Tensor, "batch time heads head_dim"]
    dt: Float[Tensor, "batch time heads"]
    A: Float[Tensor, "heads"]
    B: Float[Tensor, "batch time groups state"]
    C: Float[Tensor, "batch time groups state"]
    initial_state: Float[Tensor, "batch heads head_dim state"] | None
    segments: Int[Tensor, "batch time"] | None

    @property
    def request(self) -> SSDRequest:
        """See `registry.Inputs`."""
        tensors = [tensor for tensor in self[:6] if tensor is not None]
        return SSDRequest(
            device=self.x.device.type,
            dtype=self.x.dtype,
            segments=self.segments is not None,
            gradients=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
            even=self.x.shape[-1] % 2 == 0 and self.B.shape[-1] % 2 == 0,
        )

    def results(self) -> list[Tensor]:
        """See `untraced.Shaped`."""
        return [
            self.x.new_empty(self.x.shape),
            self.x.new_empty(self.state_shape, dtype=accumulation_dtype(self.x.dtype)),
        ]

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, head_dim, state."""
        batch, _, heads, head_dim = self.x.shape
        return batch, heads, head_dim, self.B.shape[-1]


SSD: Op[SSDInputs] = Op("ssd", Shapes(SSDInputs, (("heads", "groups"),)))
untraced = Untraced("ssd_untraced", SSDInputs)
"""Decorates backends that `torch.compile` cannot look into."""


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
        segments: document boundaries, as in `fusiontree.kernels.common.documents`.
        backend: "auto" or one of `SSD.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return SSD(SSDInputs(x, dt, A, B, C, initial_state, segments), backend)
