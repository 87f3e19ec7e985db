"""The operator `selective_scan`: its arguments, and what the choice of a backend depends on."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype, padding_joined, previous
from fusiontree.kernels.common.shapes import Shapes
from fusiontree.kernels.common.untraced import Untraced
from fusiontree.kernels.registry import Op


class SelectiveScanRequest(NamedTuple):
    """The properties of a call of `selective_scan` that decide which backends serve it; `state` is the number of
    entries a channel."""

    device: str
    dtype: torch.dtype
    segments: bool
    state: int


class SelectiveScanInputs(NamedTuple):
    """The arguments of `selective_scan`; `segments` as in `fusiontree.kernels.common.documents`."""

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
        return [
            self.x.new_empty(self.x.shape),
            self.x.new_empty(self.state_shape, dtype=accumulation_dtype(self.x.dtype)),
        ]

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
untraced = Untraced("selective_scan_untraced", SelectiveScanInputs)
"""Decorates backends that `torch.compile` cannot look into."""


def with_groups(values: Tensor, x: Tensor) -> Float[Tensor, "... groups state"]:
    """Adds the dimension of groups to B or C, where a call with one group left it out."""
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
        B: input weights of the state; channel j uses group j // (channels / groups).
        C: output weights of the state, by group likewise.
        initial_state: the state before the first token; None is zeros.
        segments: document boundaries, as in `fusiontree.kernels.common.documents`.
        backend: "auto" or one of `SELECTIVE_SCAN.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    B, C = with_groups(B, x), with_groups(C, x)
    return SELECTIVE_SCAN(SelectiveScanInputs(x, dt, A, B, C, initial_state, segments), backend)
