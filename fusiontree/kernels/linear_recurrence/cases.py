"""Calls of `linear_recurrence` for laws, `bench` and `doctor`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusiontree.kernels.common.cases import Case, Device, Draw
from fusiontree.kernels.linear_recurrence.decode import linear_recurrence_step
from fusiontree.kernels.linear_recurrence.op import LINEAR_RECURRENCE, LinearRecurrenceInputs


@dataclass(frozen=True)
class LinearRecurrenceCase(Case):
    """RG-LRU's recurrence in a layer of width 1024; the first channel keeps everything, the second nothing."""

    op: ClassVar[str] = "linear_recurrence"
    channels: int = 1024

    def about(self, tokens: int) -> str:
        return f"{self.channels} channels"

    def inputs(
        self, tokens: int, dtype: torch.dtype, device: Device = "cpu", *, seed: int = 0, rows: int = 1
    ) -> LinearRecurrenceInputs:
        draw, shape = Draw(dtype, device, seed), (rows, tokens, self.channels)
        x, a = draw.normal(*shape), draw.uniform(0.0, 1.0, *shape)
        a[..., 0], a[..., 1] = 1.0, 0.0
        return LinearRecurrenceInputs(x, a, None, None)

    def flops(self, tokens: int) -> float:
        """There is no matrix product."""
        return 0.0

    def step(self, state: Tensor, *arguments: Tensor) -> Tensor:
        return linear_recurrence_step(state, *arguments)[0]


LINEAR_RECURRENCE.cases = {"linear_recurrence": LinearRecurrenceCase()}
LINEAR_RECURRENCE.examples = (LinearRecurrenceCase(channels=7),)
