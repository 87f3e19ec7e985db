"""Balance: the branches of a gate have equal shares in the mean."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fusiontree.training.objectives.base import GateObjectiveSpec, GateValues, objectives


def balance(means: Float[Tensor, "*rows branches"]) -> Float[Tensor, "*rows"]:
    """n times the sum of the squared means of n branches, less 1: 0 for equal shares, n - 1 for one alone.

    The coefficient of variation squared of Shazeer et al. (arXiv 1701.06538), taken over each row as the
    sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437), so that it is the same under any cut of a step.
    """
    return means.shape[-1] * means.square().sum(-1) - 1


@objectives.register
class Balance(GateObjectiveSpec):
    """Pushes the branches of each gate to equal shares."""

    kind: Literal["balance"] = "balance"

    def of_rows(self, gate: GateValues) -> Float[Tensor, "*rows"]:
        """Of the mean shares of all units."""
        return balance(gate.row_means(gate.shares()).mean(-2))
