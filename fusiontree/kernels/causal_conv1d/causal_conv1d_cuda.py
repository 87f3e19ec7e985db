"""`causal_conv1d` by the CUDA kernels of causal-conv1d (`causal_conv1d_fn`, read at 1.7.0)."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.causal_conv1d.final import final_state
from fusiontree.kernels.causal_conv1d.op import CONV, ConvInputs, ConvRequest, untraced
from fusiontree.kernels.common.documents import silence_padding
from fusiontree.kernels.common.packages import refusal

TAPS = range(2, 5)
STRIDE = 8
"""What strides have to be a multiple of."""


def _refusal(request: ConvRequest) -> str | None:
    found = refusal(request.device, "causal-conv1d", "1.7")
    if found is not None:
        return found
    if request.dtype == torch.float64:
        return "has no float64"
    if request.taps not in TAPS:
        return "only 2 to 4 taps"
    return None if request.eights else "the channels must be a multiple of 8"


@cache
def load() -> Callable[..., Any]:
    """The library's function."""
    return import_module("causal_conv1d").causal_conv1d_fn


def _channels_last(values: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch channels time"]:
    aligned = values.stride(2) == 1 and values.stride(0) % STRIDE == 0 and values.stride(1) % STRIDE == 0
    return (values if aligned else values.contiguous()).transpose(1, 2)


def _before(inputs: ConvInputs) -> Float[Tensor, "batch channels taps-1"] | None:
    """The state, which the kernel shows to each row's first document, whatever that one's number is."""
    if inputs.initial_state is None:
        return None
    state = inputs.history()
    if inputs.segments is not None:
        state = torch.where((inputs.segments[:, :1] == 0)[..., None], state, 0.0)
    return _channels_last(state)


@CONV.backend("causal_conv1d", priority=20, supports=_refusal)
@untraced
def causal_conv1d(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """One call for all documents; with documents the kernel returns no state."""
    x, weight, bias, _, segments = inputs
    documents = None if segments is None else segments.int()
    bias = None if bias is None else bias.to(weight.dtype)
    y = load()(_channels_last(x), weight, bias, seq_idx=documents, initial_states=_before(inputs))
    return silence_padding(y.transpose(1, 2), segments), final_state(inputs)
