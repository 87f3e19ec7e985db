"""Operators on tensors, each with several backends and one meaning.

Importing nothing of the rest of the library, they can be used alone. `documents` says what boundaries mean,
`registry` how a backend is chosen.
"""

from fusiontree.kernels.attn.attention import attention
from fusiontree.kernels.attn.op import ATTENTION, AttentionInputs, AttentionRequest, Past
from fusiontree.kernels.attn.step import ATTENTION_STEP, Falling, Filled, StepInputs, StepRequest, attention_step
from fusiontree.kernels.conv.causal_conv1d import causal_conv1d, causal_conv1d_step
from fusiontree.kernels.conv.op import CONV, ConvInputs, ConvRequest
from fusiontree.kernels.registry import OPS, Choice, Op, UnsupportedError, use_backend
from fusiontree.kernels.scan.delta.gated_delta import gated_delta, gated_delta_step
from fusiontree.kernels.scan.delta.op import GATED_DELTA, GatedDeltaInputs, GatedDeltaRequest
from fusiontree.kernels.scan.linear.linear_recurrence import linear_recurrence, linear_recurrence_step
from fusiontree.kernels.scan.linear.op import LINEAR_RECURRENCE, LinearRecurrenceInputs, LinearRecurrenceRequest
from fusiontree.kernels.scan.op import SSD, SSDInputs, SSDRequest
from fusiontree.kernels.scan.selective.op import SELECTIVE_SCAN, SelectiveScanInputs, SelectiveScanRequest
from fusiontree.kernels.scan.selective.selective_scan import selective_scan, selective_scan_step
from fusiontree.kernels.scan.ssd import ssd, ssd_step

__all__ = [
    "ATTENTION",
    "ATTENTION_STEP",
    "CONV",
    "GATED_DELTA",
    "LINEAR_RECURRENCE",
    "OPS",
    "SELECTIVE_SCAN",
    "SSD",
    "AttentionInputs",
    "AttentionRequest",
    "Choice",
    "ConvInputs",
    "ConvRequest",
    "Falling",
    "Filled",
    "GatedDeltaInputs",
    "GatedDeltaRequest",
    "LinearRecurrenceInputs",
    "LinearRecurrenceRequest",
    "Op",
    "Past",
    "SSDInputs",
    "SSDRequest",
    "SelectiveScanInputs",
    "SelectiveScanRequest",
    "StepInputs",
    "StepRequest",
    "UnsupportedError",
    "attention",
    "attention_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_delta",
    "gated_delta_step",
    "linear_recurrence",
    "linear_recurrence_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "use_backend",
]
