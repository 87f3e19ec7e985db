"""Causal softmax attention with a window, documents, grouped heads and a cache."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.errors import FusionTreeError
from fusiontree.kernels.attn import (  # noqa: F401  (they register)
    blocked,
    fla,
    flash_attn,
    flex,
    reference,
    sdpa,
    varlen,
    xformers,
)
from fusiontree.kernels.attn.op import ATTENTION, AttentionInputs, Past, per_head


def attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time kv_heads head_dim"],
    v: Float[Tensor, "batch time kv_heads value_dim"],
    *,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    slopes: Sequence[float] | None = None,
    past: Past | None = None,
    prefix: int = 0,
    backend: str = "auto",
) -> Float[Tensor, "batch time heads value_dim"]:
    """Softmax of scale q k^T over the keys that each query sees, times v (Vaswani et al., arXiv 1706.03762).

    A query sees the keys of its own segment at its own place and up to window - 1 before it, and those of the
    segment's prefix; segment 0 also sees cached keys, by their age. Query head j reads kv head
    j // (heads / kv_heads) (arXiv 2305.13245).
    Differentiable in q, k, v and the cached keys and values.

    Args:
        window: visible keys, the query's own included; None is all.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118).
        segments: document boundaries, as in `fusiontree.kernels.documents`.
        slopes: one for each query head: scores, capped ones too, fall by that much with every token from the key to
            the query (ALiBi, arXiv 2108.12409).
        past: keys from before this call.
        prefix: how many tokens of each segment, from its first one on, the window does not hide (Hymba, arXiv
            2411.13676); of segment 0 the first cached keys, if any are cached.
        backend: "auto" or one of `ATTENTION.backends`.

    Raises:
        FusionTreeError: shapes that do not agree, no window, no scale, slopes of other heads.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    if window is not None and window < 1:
        raise FusionTreeError(f"attention: window: at least 1 visible key is needed, found {window}")
    if scale == 0:
        raise FusionTreeError("attention: scale: a number other than 0 is needed, found 0")
    if scale < 0:  # fused kernels keep the largest score, and take it to grow with the product
        q, scale = -q, -scale
    slopes = None if slopes is None else per_head("attention", slopes, q)
    return ATTENTION(AttentionInputs(q, k, v, window, scale, softcap, segments, slopes, past, prefix), backend)
