"""Calls of `selective_scan` for laws, `bench` and `doctor`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusiontree.kernels.common.cases import Case, Device, Draw
from fusiontree.kernels.selective_scan.decode import selective_scan_step
from fusiontree.kernels.selective_scan.op import SELECTIVE_SCAN, SelectiveScanInputs


@dataclass(frozen=True)
class SelectiveScanCase(Case):
    """Mamba-1's scan in a layer of width 512."""

    op: ClassVar[str] = "selective_scan"
    channels: int = 1024
    state: int = 16
    groups: int = 1

    def about(self, tokens: int) -> str:
        return f"{self.channels} channels x {self.state}"

    def inputs(
        self, tokens: int, dtype: torch.dtype, device: Device = "cpu", *, seed: int = 0, rows: int = 1
    ) -> SelectiveScanInputs:
        draw = Draw(dtype, device, seed)
        return SelectiveScanInputs(
            x=draw.normal(rows, tokens, self.channels),
            dt=draw.uniform(0.0, 1.0, rows, tokens, self.channels),
            A=-draw.uniform(0.0, 2.0, self.channels, self.state),
            B=draw.normal(rows, tokens, self.groups, self.state),
            C=draw.normal(rows, tokens, self.groups, self.state),
            initial_state=None,
            segments=None,
        )

    def flops(self, tokens: int) -> float:
        """As for `ssd`; its exponentials, one for each entry, are not counted."""
        return 4.0 * tokens * self.channels * self.state

    def step(self, state: Tensor, *arguments: Tensor) -> Tensor:
        return selective_scan_step(state, *arguments)[0]


SELECTIVE_SCAN.cases = {"selective_scan": SelectiveScanCase()}
SELECTIVE_SCAN.examples = tuple(SelectiveScanCase(channels=4, state=5, groups=groups) for groups in (1, 2))
