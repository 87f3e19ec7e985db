"""The recurrence of RG-LRU (Griffin, arXiv 2402.19427) and of HGRN (arXiv 2311.04823), without their gates."""

from fusiontree.kernels.linear_recurrence import cases, reference, two_level  # noqa: F401 - they register
from fusiontree.kernels.linear_recurrence.decode import linear_recurrence_step
from fusiontree.kernels.linear_recurrence.op import (
    LINEAR_RECURRENCE,
    LinearRecurrenceInputs,
    LinearRecurrenceRequest,
    linear_recurrence,
)

__all__ = [
    "LINEAR_RECURRENCE",
    "LinearRecurrenceInputs",
    "LinearRecurrenceRequest",
    "linear_recurrence",
    "linear_recurrence_step",
]
