"""The sparsemax gate: the shares nearest to the logits, so that branches far behind get exactly 0.

Martins and Astudillo, From softmax to sparsemax, arXiv 1602.02068, algorithm 1.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.core.context import Context
from fusiontree.core.contracts import GateScope, Weights, gates
from fusiontree.gates.base import Features
from fusiontree.gates.softmax import Softmax, SoftmaxGate


@gates.register
class Sparsemax(LearnedGateSpec):
    kind: Literal["sparsemax"] = "sparsemax"
