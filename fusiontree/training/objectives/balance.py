"""Balance: an objective that makes the branches of a gate have equal mean shares."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fusiontree.training.objectives.base import GateObjectiveSpec, GateValues, objectives


def balance(means: Float[Tensor, "*rows branches"]) -> Float[Tensor, "*rows"]:
    """n times the sum of the squared means of n branches, minus 1: 0 for equal shares, n - 1 if one branch has all.

    This is the squared coefficient of variation of Shazeer et al. (arXiv 1701.06538), taken per row like the
    sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437). Cutting a step into micro-batches does not change it.
    """
    return means.shape[-1] * means.square().sum(-1) - 1


@objectives.register
class Balance(GateObjectiveSpec):
    """Pushes the branches of each gate to equal shares."""

    kind: Literal["balance"] = "balance"

    def of_rows(self, gate: GateValues) -> Float[Tensor, "*rows"]:
        """The balance of the mean shares; the means are over positions and units."""
        return balance(gate.row_means(gate.shares()).mean(-2))
