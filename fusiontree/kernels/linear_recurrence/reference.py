"""`linear_recurrence` as the recurrence that defines it, one token at a time: the truth, in float64."""

import torch
from torch import Tensor

from fusiontree.kernels.common.documents import silence_padding
from fusiontree.kernels.linear_recurrence.op import LINEAR_RECURRENCE, LinearRecurrenceInputs


@LINEAR_RECURRENCE.backend("reference")
def reference(inputs: LinearRecurrenceInputs) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + x_t in the accumulation dtype; no matrix product, and so nothing for torch's FLOP counter."""
    x, a, state, segments = inputs.prepared()
    assert state is not None
    outputs = []
    for t in range(x.shape[1]):
        state = a[:, t] * state + x[:, t]
        outputs.append(state)
    return silence_padding(torch.stack(outputs, dim=1).to(inputs.x.dtype), segments), state
