"""Entropy: an objective that makes each gate choose one branch."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.training.objectives.base import GateObjectiveSpec, GateValues, objectives


def entropy(values: Float[Tensor, "*places branches"]) -> Float[Tensor, "*places"]:
    """The normalised entropy of the branches' shares: 1 for equal shares, 0 if one branch has all."""
    smallest = torch.finfo(values.dtype).tiny  # gives a share of exactly 0 a finite gradient
    nats = -(values * values.clamp_min(smallest).log()).sum(-1)
    return nats / math.log(max(values.shape[-1], 2))


@objectives.register
class Entropy(GateObjectiveSpec):
    """Pushes each gate to choose one branch."""

    kind: Literal["entropy"] = "entropy"

    def of_rows(self, gate: GateValues) -> Float[Tensor, "*rows"]:
        """The mean over positions and units."""
        return gate.row_means(entropy(gate.shares())[..., None]).mean((-2, -1))
