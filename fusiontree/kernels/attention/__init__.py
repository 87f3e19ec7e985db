"""Causal softmax attention with a window, documents, grouped heads and a cache."""

from fusiontree.kernels.attention import blocked, cases, fla, flash_attn, flex, reference, sdpa, varlen, xformers  # noqa: F401 - they register
from fusiontree.kernels.attention.decode import (
    ATTENTION_STEP,
    AlibiBias,
    Filled,
    StepInputs,
    StepRequest,
    attention_step,
)
from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs, AttentionRequest, Past, attention

__all__ = [
    "ATTENTION",
    "ATTENTION_STEP",
    "AlibiBias",
    "AttentionInputs",
    "AttentionRequest",
    "Filled",
    "Past",
    "StepInputs",
    "StepRequest",
    "attention",
    "attention_step",
]
