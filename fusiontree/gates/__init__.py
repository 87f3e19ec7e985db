"""How much of each branch."""

from fusiontree.core.contracts import gates
from fusiontree.gates.constant import Constant
from fusiontree.gates.hard_concrete import HardConcrete
from fusiontree.gates.sigmoid import Sigmoid
from fusiontree.gates.softmax import Softmax

__all__ = ["Constant", "HardConcrete", "Sigmoid", "Softmax", "gates"]
