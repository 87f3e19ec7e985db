"""The operator `linear_recurrence`: its arguments, and what the choice of a backend depends on."""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype, padding_joined, previous, real, silence_padding
from fusiontree.kernels.common.shapes import Shapes
from fusiontree.kernels.registry import Op


class LinearRecurrenceRequest(NamedTuple):
    """The properties of a call of `linear_recurrence` that decide which backends serve it."""

    device: str
    dtype: torch.dtype
    segments: bool


class LinearRecurrenceInputs(NamedTuple):
    """The arguments of `linear_recurrence`; `segments` as in `fusiontree.kernels.common.documents`."""

    x: Float[Tensor, "batch time channels"]
    a: Float[Tensor, "batch time channels"]
    initial_state: Float[Tensor, "batch channels"] | None
    segments: Int[Tensor, "batch time"] | None

    @property
    def request(self) -> LinearRecurrenceRequest:
        """See `registry.Inputs`."""
        return LinearRecurrenceRequest(self.x.device.type, self.x.dtype, segments=self.segments is not None)

    def results(self) -> list[Tensor]:
        """Empty tensors like the results."""
        batch, _, channels = self.x.shape
        return [
            self.x.new_empty(self.x.shape),
            self.x.new_empty(batch, channels, dtype=accumulation_dtype(self.x.dtype)),
        ]

    def prepared(self) -> Self:
        """In the accumulation dtype, without boundaries: a = 0 where a document starts, and padding, with a = 1
        and x = 0, leaves the state alone."""
        dtype, start = accumulation_dtype(self.x.dtype), self.initial_state
        state = self.results()[1].zero_() if start is None else start.to(dtype)
        x, a, segments = self.x.to(dtype), self.a.to(dtype), self.segments
        if segments is not None:
            joined = padding_joined(segments)
            a = torch.where((joined == previous(joined))[..., None], a, 0.0)
            x, a = silence_padding(x, segments), torch.where(real(segments)[..., None], a, 1.0)
        return self._replace(x=x, a=a, initial_state=state)


LINEAR_RECURRENCE: Op[LinearRecurrenceInputs] = Op("linear_recurrence", Shapes(LinearRecurrenceInputs))


def linear_recurrence(
    x: Float[Tensor, "batch time channels"],
    a: Float[Tensor, "batch time channels"],
    *,
    initial_state: Float[Tensor, "batch channels"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels"]]:
    """h_t = a_t h_{t-1} + x_t, each channel by itself.

    Returns h in x's dtype, and the state after each row's last real token in float32 (float64 for float64).
    Differentiable in all floating-point arguments, through both results.

    Args:
        x: the inputs that are added.
        a: the decays, in [0, 1], both ends included; float32, because many are close to 1.
        initial_state: the state before the first token; None is zeros.
        segments: document boundaries, as in `fusiontree.kernels.common.documents`.
        backend: "auto" or one of `LINEAR_RECURRENCE.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return LINEAR_RECURRENCE(LinearRecurrenceInputs(x, a, initial_state, segments), backend)
