"""Calls of `gated_delta` for laws, `bench` and `doctor`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.kernels.common.cases import Case, Device, Draw
from fusiontree.kernels.gated_delta.decode import gated_delta_step
from fusiontree.kernels.gated_delta.op import GATED_DELTA, GatedDeltaInputs


@dataclass(frozen=True)
class GatedDeltaCase(Case):
    """Gated DeltaNet's scan in a layer of width 512; with `channels` each channel of a key decays by itself,
    the last 256 times as fast as the first."""

    op: ClassVar[str] = "gated_delta"
    values: ClassVar[tuple[str, ...]] = ("v",)
    heads: int = 8
    key_heads: int = 4
    key_dim: int = 128
    value_dim: int = 128
    channels: bool = False

    def about(self, tokens: int) -> str:
        return f"{self.heads} heads x {self.value_dim} on {self.key_heads} x {self.key_dim}"

    def inputs(
        self, tokens: int, dtype: torch.dtype, device: Device = "cpu", *, seed: int = 0, rows: int = 1
    ) -> GatedDeltaInputs:
        draw = Draw(dtype, device, seed)
        keys, heads = (rows, tokens, self.key_heads, self.key_dim), (rows, tokens, self.heads)
        g = -draw.uniform(0.0, 1.0, *heads, self.key_dim if self.channels else 1)
        g = g * torch.logspace(-3, 1, self.key_dim, base=4.0, device=device) if self.channels else g[..., 0]
        return GatedDeltaInputs(
            q=draw.normal(*keys) / self.key_dim,
            k=F.normalize(draw.normal(*keys), dim=-1),
            v=draw.normal(*heads, self.value_dim),
            g=g,
            beta=draw.uniform(0.0, 2.0, *heads),
            initial_state=None,
            segments=None,
        )

    def flops(self, tokens: int) -> float:
        """A read of every state for the error, an outer product, and a read for the output."""
        return 6.0 * tokens * self.heads * self.key_dim * self.value_dim

    def step(self, state: Tensor, *arguments: Tensor) -> Tensor:
        return gated_delta_step(state, *arguments)[0]


GATED_DELTA.cases = {"gated_delta": GatedDeltaCase()}
GATED_DELTA.examples = (
    GatedDeltaCase(heads=4, key_heads=2, key_dim=5, value_dim=3),
    GatedDeltaCase(heads=4, key_heads=1, key_dim=5, value_dim=3, channels=True),
    GatedDeltaCase(heads=2, key_heads=2, key_dim=4, value_dim=7, channels=True),
)
