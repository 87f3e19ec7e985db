"""SwiGLU: W_down (silu(W_gate x) * W_up x) (Shazeer, arXiv 2002.05202)."""

from typing import Literal

from fusiontree.branches.feed_forward import FeedForwardSpec
from fusiontree.components import branches


@branches.register
class SwiGLU(FeedForwardSpec):
    """A feed-forward network gated by SiLU."""

    kind: Literal["swiglu"] = "swiglu"

    @property
    def activation_name(self) -> str:
        return "silu"

    @property
    def gated(self) -> bool:
        return True
