"""Entropy: a gate decides for a branch."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.training.objectives.base import GateObjectiveSpec, GateValues, objectives


def entropy(values: Float[Tensor, "*places branches"]) -> Float[Tensor, "*places"]:
    """The entropy of the branches' shares, 1 where they are equal and 0 where one has all."""
    smallest = torch.finfo(values.dtype).tiny  # a share of exactly 0 has a finite gradient
    nats = -(values * values.clamp_min(smallest).log()).sum(-1)
    return nats / math.log(max(values.shape[-1], 2))


@objectives.register
class Entropy(GateObjectiveSpec):
    """Pushes each gate to decide for a branch."""

    kind: Literal["entropy"] = "entropy"

    def of_rows(self, gate: GateValues) -> Float[Tensor, "*rows"]:
        """The mean over positions and units."""
        return gate.row_means(entropy(gate.shares())[..., None]).mean((-2, -1))
