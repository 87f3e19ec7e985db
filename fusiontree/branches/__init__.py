"""The leaves of the tree.

The spec classes, and the registry's `register`, `names` and `get`.
"""

from fusiontree.branches.attention import Attention, QKNorm
from fusiontree.branches.chain import Chain
from fusiontree.branches.gated_delta import GatedDelta
from fusiontree.branches.lightning import Lightning
from fusiontree.branches.linear import Linear
from fusiontree.branches.mamba1 import Mamba1
from fusiontree.branches.mamba2 import GatedNorm, Mamba2
from fusiontree.branches.mla import Mla
from fusiontree.branches.mlp import Mlp
from fusiontree.branches.moe import Moe, Router
from fusiontree.branches.rglru import RgLru
from fusiontree.branches.short_conv import ShortConv
from fusiontree.branches.swiglu import SwiGLU
from fusiontree.branches.use import Adapter, Use
from fusiontree.components import branches as _registry

register, names, get = _registry.register, _registry.names, _registry.get

__all__ = [
    "Adapter",
    "Attention",
    "Chain",
    "GatedDelta",
    "GatedNorm",
    "Lightning",
    "Linear",
    "Mamba1",
    "Mamba2",
    "Mla",
    "Mlp",
    "Moe",
    "QKNorm",
    "RgLru",
    "Router",
    "ShortConv",
    "SwiGLU",
    "Use",
    "get",
    "names",
    "register",
]
