"""The operator `gated_delta`: its arguments, and what the choice of a backend depends on."""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype, silence_padding
from fusiontree.kernels.common.shapes import Shapes
from fusiontree.kernels.registry import Op


class GatedDeltaRequest(NamedTuple):
    """The properties of a call of `gated_delta` that decide which backends serve it."""

    device: str
    dtype: torch.dtype
    segments: bool


class GatedDeltaInputs(NamedTuple):
    """The arguments of `gated_delta`; `segments` as in `fusiontree.kernels.common.documents`."""

    q: Float[Tensor, "batch time key_heads key_dim"]
    k: Float[Tensor, "batch time key_heads key_dim"]
    v: Float[Tensor, "batch time heads value_dim"]
    g: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key_dim"]
    beta: Float[Tensor, "batch time heads"]
    initial_state: Float[Tensor, "batch heads key_dim value_dim"] | None
    segments: Int[Tensor, "batch time"] | None

    @property
    def request(self) -> GatedDeltaRequest:
        """See `registry.Inputs`."""
        return GatedDeltaRequest(self.v.device.type, self.v.dtype, segments=self.segments is not None)

    def results(self) -> list[Tensor]:
        """See `untraced.Shaped`."""
        return [
            self.v.new_empty(self.v.shape),
            self.v.new_empty(self.state_shape, dtype=accumulation_dtype(self.v.dtype)),
        ]

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, key_dim, value_dim."""
        batch, _, heads, value_dim = self.v.shape
        return batch, heads, self.k.shape[-1], value_dim

    def prepared(self) -> Self:
        """The same call with g, beta and the state in the accumulation dtype, g [batch, time, heads, 1 or key_dim], and
        g = beta = 0 at padding.

        Such a token leaves the state alone, so that padding needs no other care than silence in the outputs.
        """
        dtype, start = accumulation_dtype(self.v.dtype), self.initial_state
        state = self.v.new_zeros(self.state_shape, dtype=dtype) if start is None else start.to(dtype)
        g, beta = (silence_padding(values.to(dtype), self.segments) for values in (self.g, self.beta))
        return self._replace(g=g if g.ndim == self.k.ndim else g[..., None], beta=beta, initial_state=state)


GATED_DELTA: Op[GatedDeltaInputs] = Op("gated_delta", Shapes(GatedDeltaInputs, (("heads", "key_heads"),)))


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
        q: queries of the state, already scaled.
        k: keys of length 1, or with beta |k|^2 <= 2 at least; beyond that the state grows without bound.
        g: the log of the decay, <= 0: of a head's whole state, or of each channel of its keys.
        beta: how much of the error is written, in [0, 1], or up to 2 for negative eigenvalues (arXiv 2411.12537).
        initial_state: the state before the first token; None is zeros.
        segments: document boundaries, as in `fusiontree.kernels.common.documents`.
        backend: "auto" or one of `GATED_DELTA.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return GATED_DELTA(GatedDeltaInputs(q, k, v, g, beta, initial_state, segments), backend)
