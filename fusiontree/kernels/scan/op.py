"""The operator `ssd`: its arguments, and what the choice of a backend depends on."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.documents import wide
from fusiontree.kernels.registry import Op
from fusiontree.kernels.shapes import Shapes
from fusiontree.kernels.untraced import Untraced


class SSDRequest(NamedTuple):
    """What is asked of a backend of `ssd`."""

    device: str
    dtype: torch.dtype
    segments: bool
    gradients: bool
    even: bool
    """head_dim and state are."""


class SSDInputs(NamedTuple):
    """The arguments of `ssd`; `segments` as in `fusiontree.kernels.documents`."""

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
        return [self.x.new_empty(self.x.shape), self.x.new_empty(self.state_shape, dtype=wide(self.x.dtype))]

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, head_dim, state."""
        batch, _, heads, head_dim = self.x.shape
        return batch, heads, head_dim, self.B.shape[-1]


SSD: Op[SSDInputs] = Op("ssd", Shapes(SSDInputs, (("heads", "groups"),)))
untraced = Untraced(
    "ssd_untraced",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state, Tensor? segments",
    SSDInputs,
)
"""Decorates backends."""
