"""Operators on tensors, each with several backends and one meaning, in a package of its own name.

Importing nothing of the rest of the library but its machine and its errors, they can be used alone:
`from fusiontree.kernels.ssd import ssd, ssd_step`. `common.documents` says what boundaries mean, `registry` how a
backend is chosen.
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
