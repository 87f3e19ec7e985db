"""The selective state-space recurrence of Mamba-1, S6 (Gu and Dao 2023, arXiv 2312.00752)."""

from fusiontree.kernels.selective_scan import cases, mamba_ssm, reference, two_level  # noqa: F401 - they register
from fusiontree.kernels.selective_scan.decode import selective_scan_step
from fusiontree.kernels.selective_scan.op import (
    SELECTIVE_SCAN,
    SelectiveScanInputs,
    SelectiveScanRequest,
    selective_scan,
)

__all__ = [
    "SELECTIVE_SCAN",
    "SelectiveScanInputs",
    "SelectiveScanRequest",
    "selective_scan",
    "selective_scan_step",
]
