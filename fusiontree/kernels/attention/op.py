"""The operator `attention`: its arguments, and what the choice of a backend depends on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.errors import FusionTreeError
from fusiontree.kernels.attention.visibility import Visibility, visibility_of
from fusiontree.kernels.common.shapes import Shapes
from fusiontree.kernels.common.untraced import Untraced
from fusiontree.kernels.registry import Op


class Past(NamedTuple):
    """Cached keys, in any order; a prefix comes first. `age`: tokens from a key to the call's first one (0: an
    empty slot)."""

    keys: Float[Tensor, "batch cached kv_heads head_dim"]
    values: Float[Tensor, "batch cached kv_heads value_dim"]
    age: Int[Tensor, "batch cached"]


class AttentionRequest(NamedTuple):
    """The properties of a call of `attention` that decide which backends serve it."""

    device: str
    dtype: torch.dtype
    windowed: bool
    softcap: bool
    segments: bool
    past: bool
    prefix: bool
    head_dim: int
    value_dim: int
    gradients: bool
    slopes: bool = False

    @property
    def equal_widths(self) -> bool:
        """Whether keys and values have the same width."""
        return self.head_dim == self.value_dim


class AttentionInputs(NamedTuple):
    """The arguments of `attention`."""

    q: Float[Tensor, "batch time heads head_dim"]
    k: Float[Tensor, "batch time kv_heads head_dim"]
    v: Float[Tensor, "batch time kv_heads value_dim"]
    window: int | None
    scale: float
    softcap: float | None
    segments: Int[Tensor, "batch time"] | None
    slopes: tuple[float, ...] | None = None
    past: Past | None = None
    prefix: int = 0

    @property
    def request(self) -> AttentionRequest:
        """See `registry.Inputs`."""
        time, past = self.q.shape[1], self.past
        windowed = self.window is not None and (past is not None or self.window < time)
        tensors = (self.q, self.k, self.v) + (() if past is None else (past.keys, past.values))
        return AttentionRequest(
            device=self.q.device.type,
            dtype=self.q.dtype,
            windowed=windowed,
            softcap=self.softcap is not None,
            segments=self.segments is not None,
            past=past is not None,
            prefix=windowed and self.prefix > 0,
            head_dim=self.k.shape[-1],
            value_dim=self.v.shape[-1],
            gradients=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
            slopes=self.slopes is not None,
        )

    def results(self) -> list[Tensor]:
        """See `untraced.Shaped`."""
        return [self.q.new_empty(*self.q.shape[:3], self.v.shape[-1])]

    def all_keys(self) -> tuple[Tensor, Tensor]:
        """Keys and values, cached ones first."""
        if self.past is None:
            return self.k, self.v
        keys, values = self.past.keys.to(self.k.dtype), self.past.values.to(self.v.dtype)
        return torch.cat([keys, self.k], dim=1), torch.cat([values, self.v], dim=1)

    def visibility(self) -> Visibility:
        """What the queries see."""
        age = None if self.past is None else self.past.age
        return visibility_of(self.q.shape[1], self.segments, age, (self.window, self.prefix), self.q.device)


def per_head(op: str, slopes: Sequence[float], q: Float[Tensor, "... heads head_dim"]) -> tuple[float, ...]:
    """The slopes.

    Raises:
        FusionTreeError: there is not one for each query head.
    """
    if len(slopes) != q.shape[-2]:
        raise FusionTreeError(f"{op}: slopes: expected one for each of {q.shape[-2]} heads, found {len(slopes)}")
    return tuple(slopes)


ATTENTION: Op[AttentionInputs] = Op("attention", Shapes(AttentionInputs, (("heads", "kv_heads"),)))
untraced = Untraced("attention_untraced", AttentionInputs, leave_out=("past", "prefix"))
"""Decorates backends that `torch.compile` cannot look into; they serve no cached keys."""


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
        segments: document boundaries, as in `fusiontree.kernels.common.documents`.
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
        raise FusionTreeError(f"attention: window: expected at least 1 visible key, found {window}")
    if scale == 0:
        raise FusionTreeError("attention: scale: expected a number other than 0, found 0")
    if scale < 0:  # fused kernels keep the largest score, and take it to grow with the product
        q, scale = -q, -scale
    slopes = None if slopes is None else per_head("attention", slopes, q)
    return ATTENTION(AttentionInputs(q, k, v, window, scale, softcap, segments, slopes, past, prefix), backend)
