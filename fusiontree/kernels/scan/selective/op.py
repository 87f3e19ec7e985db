"""The operator `selective_scan`: its arguments, and what the choice of a backend depends on."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusiontree.kernels.documents import padding_joined, previous, wide
from fusiontree.kernels.registry import Op
from fusiontree.kernels.shapes import Shapes
from fusiontree.kernels.untraced import Untraced


class SelectiveScanRequest(NamedTuple):
    """What is asked of a backend of `selective_scan`; `state` is the number of entries a channel."""

    device: str
    dtype: torch.dtype
    segments: bool
    state: int


class SelectiveScanInputs(NamedTuple):
    """The arguments of `selective_scan`; `segments` as in `fusiontree.kernels.documents`."""

    x: Float[Tensor, "batch time channels"]
    dt: Float[Tensor, "batch time channels"]
    A: Float[Tensor, "channels state"]
    B: Float[Tensor, "batch time groups state"]
    C: Float[Tensor, "batch time groups state"]
    initial_state: Float[Tensor, "batch channels state"] | None
    segments: Int[Tensor, "batch time"] | None

    @property
    def request(self) -> SelectiveScanRequest:
        """See `registry.Inputs`."""
        return SelectiveScanRequest(
            device=self.x.device.type,
            dtype=self.x.dtype,
            segments=self.segments is not None,
            state=self.A.shape[1],
        )

    def results(self) -> list[Tensor]:
        """See `untraced.Shaped`."""
        return [self.x.new_empty(self.x.shape), self.x.new_empty(self.state_shape, dtype=wide(self.x.dtype))]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Batch, channels, state."""
        channels, entries = self.A.shape
        return self.x.shape[0], channels, entries

    def starts(self) -> Bool[Tensor, "batch time"] | None:
        """The tokens before which the state is emptied; None where that never happens."""
        if self.segments is None:
            return None
        joined = padding_joined(self.segments)
        return joined != previous(joined)


SELECTIVE_SCAN: Op[SelectiveScanInputs] = Op("selective_scan", Shapes(SelectiveScanInputs, (("channels", "groups"),)))
untraced = Untraced(
    "selective_scan_untraced",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state, Tensor? segments",
    SelectiveScanInputs,
)
"""Decorates backends."""
