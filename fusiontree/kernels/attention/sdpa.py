"""`attention` by torch's scaled_dot_product_attention, for full causal attention over one document."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs, AttentionRequest
from fusiontree.products import widens


def _refusal(request: AttentionRequest) -> str | None:
    unserved = {
        "a window": request.windowed,
        "softcap": request.softcap,
        "segments": request.segments,
        "slopes": request.slopes,
        "cached keys": request.past,
        "value_dim unlike head_dim (quadratic memory)": not request.equal_widths,
        "half precision without units for it (slow)": widens(request.device, request.dtype),
    }
    found = [what for what, asked in unserved.items() if asked]
    return f"not served: {', '.join(found)}" if found else None


@ATTENTION.backend("sdpa", priority=30, supports=_refusal)
def sdpa(inputs: AttentionInputs) -> Float[Tensor, "batch time heads value_dim"]:
    """One call of the fused causal kernel."""
    q, k, v = (tensor.transpose(1, 2) for tensor in inputs[:3])
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.scale, enable_gqa=gqa).transpose(1, 2)
