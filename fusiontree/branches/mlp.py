"""Feed-forward networks by activation: gelu (arXiv 1606.08415), relu2 (arXiv 2109.08668), geglu (arXiv 2002.05202)."""

from typing import Literal

from fusiontree.branches.feed_forward import FeedForwardSpec
from fusiontree.components import branches

GATED = {"geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""Activations with a gate, and the function that the gate goes through."""


@branches.register
class Mlp(FeedForwardSpec):
    """A feed-forward network with gelu, relu2 or geglu.

    `geglu` has a gate map beside the other, gelu(W_gate x) * W_up x; the others have not. `gelu_tanh` and
    `geglu_tanh` are the same with gelu's approximation by tanh (GPT-2, Gemma).
    """

    kind: Literal["mlp"] = "mlp"
    activation: Literal["gelu", "gelu_tanh", "relu2", "geglu", "geglu_tanh"] = "gelu"

    @property
    def activation_name(self) -> str:
        return GATED.get(self.activation, self.activation)

    @property
    def gated(self) -> bool:
        """Only geglu, either form."""
        return self.activation in GATED
