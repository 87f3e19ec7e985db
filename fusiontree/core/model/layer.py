"""One layer of the stack: up to two residual sub-layers."""

from jaxtyping import Float
from torch import Tensor, nn

from fusiontree.core.contracts.context import Context
from fusiontree.core.contracts.modules import NormModule, scaled
from fusiontree.core.contracts.node import Node, Scope
from fusiontree.core.model.layers import LayerSpec

Stream = Float[Tensor, "batch time width"]
PLACES = {"pre": ["before"], "post": ["after"], "sandwich": ["before", "after"], "none": []}
"""Where norms stand, by the placement."""


class Layer(nn.Module):
    """The module of a `LayerSpec`. Norms live at `norm.<sub-layer>.<before|after>`."""

    def __init__(self, spec: LayerSpec, scope: Scope) -> None:
        super().__init__()
        self.spec = spec
        self.mixer = spec.mixer.build(scope) if spec.mixer else None
        self.ffn = spec.ffn.build(scope) if spec.ffn else None
        self.norm, self.places = nn.ModuleDict(), PLACES[spec.placement]
        for name, node in (("mixer", self.mixer), ("ffn", self.ffn)):
            if node is not None:
                self.norm[name] = nn.ModuleDict({p: NormModule(spec.norm, scope.width) for p in self.places})

    def forward(self, x: Stream, context: Context) -> Stream:
        """Run the sub-layers that there are."""
        if self.mixer is not None:
            x = self._residual(x, "mixer", self.mixer, context)
        if self.ffn is not None:
            x = self._residual(x, "ffn", self.ffn, context)
        return x

    def _residual(self, x: Stream, name: str, node: Node, context: Context) -> Stream:
        norms, residual = self.norm[name], self.spec.residual
        assert isinstance(norms, nn.ModuleDict)
        normed = norms["before"](x) if "before" in self.places else x
        y = node(normed, context)
        y = norms["after"](y) if "after" in self.places else y
        source = x if residual.source == "stream" else normed
        return scaled(source, residual.keep) + scaled(y, residual.add)
