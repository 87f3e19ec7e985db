"""`selective_scan` as the recurrence that defines it, one token at a time: the truth, in float64."""

import torch
from einops import rearrange
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype, silence_padding
from fusiontree.kernels.common.prepared import prepared
from fusiontree.kernels.selective_scan.op import SELECTIVE_SCAN, SelectiveScanInputs


@SELECTIVE_SCAN.backend("reference")
def reference(inputs: SelectiveScanInputs) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t, all in the accumulation dtype.

    Each product is a matrix product, so that torch's FLOP counter sees 4 channels state a token.
    """
    x, dt, A, B, C, state, segments = prepared(inputs)
    assert state is not None
    starts, groups = inputs.starts(), B.shape[2]
    B, C = B.to(accumulation_dtype(B.dtype)), C.to(accumulation_dtype(C.dtype))
    inflow = rearrange(dt * x, "b t (g r) -> b t g r 1", g=groups)
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None], 0.0, state)
        added = inflow[:, t] @ B[:, t, :, None, :]
        state = torch.exp(dt[:, t, :, None] * A) * state + added.flatten(1, 2)
        y = state.unflatten(1, (groups, -1)) @ C[:, t, :, :, None]
        outputs.append(y.flatten(1))
    return silence_padding(torch.stack(outputs, dim=1).to(x.dtype), segments), state
