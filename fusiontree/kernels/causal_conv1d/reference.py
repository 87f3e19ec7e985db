"""`causal_conv1d` one token at a time: the truth, in float64."""

import torch
from einops import rearrange
from torch import Tensor

from fusiontree.kernels.causal_conv1d.op import CONV, ConvInputs
from fusiontree.kernels.common.documents import accumulation_dtype, padding_joined, previous, real, silence_padding


@CONV.backend("reference")
def reference(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """Slide a window of `taps` inputs, emptied where a document starts.

    The taps are contracted by a matrix product: torch's FLOP counter sees 2 taps channels a token.
    """
    x, weight, bias, _, segments = inputs
    dtype, history = accumulation_dtype(x.dtype), inputs.history()
    taps = weight.to(dtype)[:, :, None]
    outputs = []
    if segments is None:
        segments = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    joined = padding_joined(segments)
    kept, advance = (joined == previous(joined))[..., None, None], real(segments)[..., None, None]
    for t in range(x.shape[1]):
        window = torch.cat([torch.where(kept[:, t], history, 0.0), x[:, t, None]], dim=1).to(dtype)
        product = rearrange(window, "b k d -> d b k") @ taps
        outputs.append(rearrange(product, "d b 1 -> b d"))
        history = torch.where(advance[:, t], window[:, 1:].to(x.dtype), history)
    y = torch.stack(outputs, dim=1) if outputs else x.to(dtype)
    y = y if bias is None else y + bias.to(dtype)
    return silence_padding(y.to(x.dtype), segments), history
