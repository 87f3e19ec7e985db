"""Calls of `causal_conv1d` for laws, `bench` and `doctor`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusiontree.kernels.causal_conv1d.decode import causal_conv1d_step
from fusiontree.kernels.causal_conv1d.op import CONV, ConvInputs
from fusiontree.kernels.common.cases import Case, Device, Draw


@dataclass(frozen=True)
class ConvCase(Case):
    """The convolution of a layer with 1024 inner channels, and 128 each for B and C."""

    op: ClassVar[str] = "causal_conv1d"
    compiled: ClassVar[tuple[str, ...]] = ("shifted",)
    channels: int = 1280
    taps: int = 4
    bias: bool = True

    def about(self, tokens: int) -> str:
        return f"{self.channels} channels, {self.taps} taps"

    def inputs(
        self, tokens: int, dtype: torch.dtype, device: Device = "cpu", *, seed: int = 0, rows: int = 1
    ) -> ConvInputs:
        draw = Draw(dtype, device, seed)
        return ConvInputs(
            x=draw.normal(rows, tokens, self.channels),
            weight=draw.normal(self.channels, self.taps),
            bias=draw.normal(self.channels) if self.bias else None,
            initial_state=None,
            segments=None,
        )

    def flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.channels * self.taps

    def step(self, state: Tensor, *arguments: Tensor) -> Tensor:
        x, *constants = arguments
        return causal_conv1d_step(state, x[:, None], *constants)[:, 0]


CONV.cases = {"causal_conv1d": ConvCase()}
CONV.examples = tuple(ConvCase(channels=3, taps=taps, bias=taps > 1) for taps in (1, 2, 4))
