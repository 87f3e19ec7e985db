"""`causal_conv1d` by flash-linear-attention's Triton kernels (`fla.modules.causal_conv1d`, read at fla-core 0.6.0)."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fusiontree.kernels.causal_conv1d.final import final_state
from fusiontree.kernels.causal_conv1d.op import CONV, ConvInputs, ConvRequest, untraced
from fusiontree.kernels.common.documents import packed, silence_padding
from fusiontree.kernels.common.packages import refusal


def _refusal(request: ConvRequest) -> str | None:
    found = refusal(request.device, "fla-core", "0.6")
    if found is not None:
        return found
    if request.dtype == torch.float64:
        return "has no float64"
    return "only 2 taps and more" if request.taps == 1 else None


@cache
def load() -> Callable[..., Any]:
    """The library's function."""
    return import_module("fla.modules.causal_conv1d").causal_conv1d


def _padded(state: Float[Tensor, "rows taps-1 channels"] | None) -> Float[Tensor, "rows channels taps"] | None:
    """The library's state has one input a tap; the oldest is never read."""
    return None if state is None else pad(state.transpose(1, 2), (1, 0))


@CONV.backend("fla", priority=30, supports=_refusal)
@untraced
def fla(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """Documents one after another, each with the state that it starts from."""
    x, weight, bias, initial, segments = inputs
    state = None if initial is None else inputs.history()
    if segments is None:
        return load()(x, weight, bias, initial_state=_padded(state))[0], final_state(inputs)
    documents = packed(segments, x)
    y, _ = load()(
        documents.pack(x)[None],
        weight,
        bias,
        initial_state=_padded(None if state is None else documents.entering(state)),
        cu_seqlens=documents.bounds,
        cu_seqlens_cpu=documents.host,
    )
    return silence_padding(documents.unpack(y[0]), segments), final_state(inputs)
