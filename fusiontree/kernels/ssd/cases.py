"""Calls of `ssd` for laws, `bench` and `doctor`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusiontree.kernels.common.cases import Case, Device, Draw
from fusiontree.kernels.ssd.decode import ssd_step
from fusiontree.kernels.ssd.op import SSD, SSDInputs


@dataclass(frozen=True)
class SSDCase(Case):
    """Mamba-2's scan in a layer of width 512."""

    op: ClassVar[str] = "ssd"
    compiled: ClassVar[tuple[str, ...]] = ("chunked",)
    heads: int = 16
    head_dim: int = 64
    state: int = 128
    groups: int = 1

    def about(self, tokens: int) -> str:
        return f"{self.heads} heads x {self.head_dim}, state {self.state}, groups {self.groups}"

    def inputs(
        self, tokens: int, dtype: torch.dtype, device: Device = "cpu", *, seed: int = 0, rows: int = 1
    ) -> SSDInputs:
        draw = Draw(dtype, device, seed)
        return SSDInputs(
            x=draw.normal(rows, tokens, self.heads, self.head_dim),
            dt=draw.uniform(0.0, 1.0, rows, tokens, self.heads),
            A=-draw.uniform(0.0, 2.0, self.heads),
            B=draw.normal(rows, tokens, self.groups, self.state),
            C=draw.normal(rows, tokens, self.groups, self.state),
            initial_state=None,
            segments=None,
        )

    def flops(self, tokens: int) -> float:
        """An outer product and a read of every state: products within chunks are a backend's own choice."""
        return 4.0 * tokens * self.heads * self.head_dim * self.state

    def step(self, state: Tensor, *arguments: Tensor) -> Tensor:
        return ssd_step(state, *arguments)[0]


SSD.cases = {"ssd": SSDCase()}
SSD.examples = tuple(SSDCase(heads=4, head_dim=3, state=5, groups=groups) for groups in (1, 2, 4))
