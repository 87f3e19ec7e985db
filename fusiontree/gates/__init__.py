"""How much of each branch.

The spec classes, and the registry's `register`, `names` and `get`.
"""

from fusiontree.components import gates as _registry
from fusiontree.gates.base import LearnedGateSpec, Logit
from fusiontree.gates.constant import Constant
from fusiontree.gates.hard_concrete import HardConcrete
from fusiontree.gates.sigmoid import Sigmoid, TwoWayGate, TwoWayGateSpec
from fusiontree.gates.softmax import Softmax

register, names, get = _registry.register, _registry.names, _registry.get

__all__ = [
    "Constant",
    "HardConcrete",
    "LearnedGateSpec",
    "Logit",
    "Sigmoid",
    "Softmax",
    "TwoWayGate",
    "TwoWayGateSpec",
    "get",
    "names",
    "register",
]
