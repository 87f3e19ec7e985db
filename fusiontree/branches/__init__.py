"""The leaves of the tree."""

from fusiontree.branches.attention import Attention
from fusiontree.branches.mamba2 import GatedNorm, Mamba2
from fusiontree.branches.mlp import Mlp
from fusiontree.branches.swiglu import SwiGLU
from fusiontree.core.contracts import branches

__all__ = ["Attention", "GatedNorm", "Mamba2", "Mlp", "SwiGLU", "branches"]
