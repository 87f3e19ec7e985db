"""Feed-forward networks by activation: gelu (arXiv 1606.08415), relu2 (arXiv 2109.08668), geglu (arXiv 2002.05202)."""

from typing import Literal

from fusiontree.branches.feed_forward import FeedForwardSpec
from fusiontree.core.contracts import branches


@branches.register
class Mlp(FeedForwardSpec):
    """A feed-forward network with gelu, relu2 or geglu.

    `geglu` has a gate map beside the other, gelu(W_gate x) * W_up x; the others have not.
    """

    kind: Literal["mlp"] = "mlp"
    activation: Literal["gelu", "relu2", "geglu"] = "gelu"

    @property
    def activation_name(self) -> str:
        """The function without the gate."""
        return "gelu" if self.gated else self.activation

    @property
    def gated(self) -> bool:
        """Only geglu."""
        return self.activation == "geglu"
