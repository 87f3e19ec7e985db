"""How much of each branch."""

from fusiontree.core.contracts import gates
from fusiontree.gates.base import LearnedGateSpec, Logit
from fusiontree.gates.constant import Constant
from fusiontree.gates.hard_concrete import HardConcrete
from fusiontree.gates.sigmoid import Sigmoid, TwoWayGate, TwoWayGateSpec
from fusiontree.gates.softmax import Softmax

__all__ = [
    "Constant",
    "HardConcrete",
    "LearnedGateSpec",
    "Logit",
    "Sigmoid",
    "Softmax",
    "TwoWayGate",
    "TwoWayGateSpec",
    "gates",
]
