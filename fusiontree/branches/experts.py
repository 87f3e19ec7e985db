"""The products of stacked feed-forward networks with the tokens that visit each."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.components import Module, fan_in, products
from fusiontree.kernels.common.untraced import Untraced

Tokens = Float[Tensor, "tokens width"]
Shares = Float[Tensor, "tokens top_k"]
Choice = Int[Tensor, "tokens top_k"]
Inward = Float[Tensor, "experts hidden width"]


class Visits(NamedTuple):
    """Tokens, those of the first expert first, how many each expert has, and the experts' maps."""

    x: Float[Tensor, "visits width"]
    counts: Int[Tensor, "experts"]
    gate: Inward | None
    up: Inward
    down: Float[Tensor, "experts width hidden"]

    def results(self) -> list[Tensor]:
        """Empty tensors like the results."""
        return [torch.empty_like(self.x)]


untraced = Untraced("experts", Visits)


@untraced
def one_by_one(visits: Visits) -> Float[Tensor, "visits width"]:
    """What each expert that has tokens makes of them; reads the counts back.

    `torch._grouped_mm` would not: it is private, and has no float64 and no strides that are no multiple of 16 bytes.
    """
    parts = visits.x.split(visits.counts.tolist())
    gates = [None] * len(parts) if visits.gate is None else visits.gate.unbind()
    experts = zip(parts, gates, visits.up.unbind(), visits.down.unbind(), strict=True)
    made = [_expert(*expert) for expert in experts if len(expert[0])]
    return torch.cat(made).to(visits.x.dtype)  # which autocast would change


def _expert(x: Tokens, gate: Tensor | None, up: Tensor, down: Tensor) -> Tokens:
    return products.linear(hidden(None if gate is None else products.linear(x, gate), products.linear(x, up)), down)


def hidden(gate: Float[Tensor, "tokens hidden"] | None, up: Float[Tensor, "tokens hidden"]) -> Tensor:
    """silu(gate) * up, and relu(up)^2 where there is no gate."""
    return F.relu(up).square() if gate is None else F.silu(gate) * up


class Experts(Module):
    """The maps of all experts, stacked: `gate` and `up` [experts, hidden, width], `down` [experts, width, hidden]."""

    def __init__(self, inward: tuple[int, int, int], *, gated: bool) -> None:
        super().__init__()
        experts, features, width = inward
        self.gate = self.declare("gate", inward, fan_in(), decay=True) if gated else None
        self.up = self.declare("up", inward, fan_in(), decay=True)
        self.down = self.declare("down", (experts, width, features), fan_in(), decay=True)

    def forward(self, x: Tokens, shares: Shares, choice: Choice) -> Tokens:
        """The sum of the visited experts' outputs, times their shares, for each token."""
        if len(x) == 1 and not torch.compiler.is_compiling():
            return self._of_one(x, shares, choice)
        visited = choice.flatten()
        by_expert = visited.argsort(stable=True)
        counts = visited.new_zeros(len(self.up)).scatter_add_(0, visited, torch.ones_like(visited))
        made = one_by_one(Visits(x[by_expert // choice.shape[1]], counts, self.gate, self.up, self.down))
        by_token = made[by_expert.argsort()].unflatten(0, choice.shape)
        return (by_token * shares[..., None]).sum(1)

    def _of_one(self, x: Tokens, shares: Shares, choice: Choice) -> Tokens:
        """The outputs for one token, without sorting tokens by expert, which takes a tenth of a decode step."""
        gates = [None] * len(self.up) if self.gate is None else self.gate
        made = [_expert(x, gates[expert], self.up[expert], self.down[expert]) for expert in choice[0].tolist()]
        return (torch.stack(made, 1).to(x.dtype) * shares[..., None]).sum(1)
