"""The selective state-space recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060)."""

from fusiontree.kernels.ssd import cases, chunked, fla, mamba_ssm, reference  # noqa: F401 - they register
from fusiontree.kernels.ssd.decode import ssd_step
from fusiontree.kernels.ssd.op import SSD, SSDInputs, SSDRequest, ssd

__all__ = [
    "SSD",
    "SSDInputs",
    "SSDRequest",
    "ssd",
    "ssd_step",
]
