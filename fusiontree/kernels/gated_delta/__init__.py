"""The recurrence of Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), and with a decay for each
channel that of Kimi Delta Attention (arXiv 2510.26692)."""

from fusiontree.kernels.gated_delta import cases, chunked, reference  # noqa: F401 - they register
from fusiontree.kernels.gated_delta.decode import gated_delta_step
from fusiontree.kernels.gated_delta.op import GATED_DELTA, GatedDeltaInputs, GatedDeltaRequest, gated_delta

__all__ = [
    "GATED_DELTA",
    "GatedDeltaInputs",
    "GatedDeltaRequest",
    "gated_delta",
    "gated_delta_step",
]
