"""Operators on tensors, one package each, with one meaning and several backends.

They import only `machine` and `errors` of the library, so they can be used alone:
`from fusiontree.kernels.ssd import ssd, ssd_step`. `common.documents` defines document boundaries, `registry` the
choice of a backend.
"""

from fusiontree.kernels import attention, causal_conv1d, gated_delta, linear_recurrence, selective_scan, ssd
from fusiontree.kernels.registry import OPS, Choice, Op, UnsupportedError, use_backend

__all__ = [
    "OPS",
    "Choice",
    "Op",
    "UnsupportedError",
    "attention",
    "causal_conv1d",
    "gated_delta",
    "linear_recurrence",
    "selective_scan",
    "ssd",
    "use_backend",
]
