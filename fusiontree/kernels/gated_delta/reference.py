"""`gated_delta` as the recurrence that defines it, one token at a time: the truth, in float64."""

import torch
from einops import repeat
from torch import Tensor

from fusiontree.kernels.common.documents import padding_joined, previous, silence_padding
from fusiontree.kernels.gated_delta.op import GATED_DELTA, GatedDeltaInputs


@GATED_DELTA.backend("reference")
def reference(inputs: GatedDeltaInputs) -> tuple[Tensor, Tensor]:
    """S' = Diag(a_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - k_t^T S')^T, o_t = q_t^T S_t, all in the accumulation dtype.

    Each product is a matrix product, so that torch's FLOP counter sees 6 heads key_dim value_dim a token.
    """
    q, k, v, g, beta, state, segments = inputs.prepared()
    assert state is not None
    share = v.shape[2] // k.shape[2]
    q, k = (repeat(values.to(g.dtype), "b t h n -> b t (h share) 1 n", share=share) for values in (q, k))
    decay = torch.exp(g)
    if segments is not None:
        joined = padding_joined(segments)
        decay = torch.where((joined == previous(joined))[..., None, None], decay, 0.0)
    outputs = []
    for t in range(v.shape[1]):
        state = decay[:, t, :, :, None] * state
        error = v[:, t, :, None] - k[:, t] @ state
        state = state + k[:, t].mT @ (beta[:, t, :, None, None] * error)
        outputs.append((q[:, t] @ state).squeeze(-2))
    return silence_padding(torch.stack(outputs, dim=1).to(v.dtype), segments), state
