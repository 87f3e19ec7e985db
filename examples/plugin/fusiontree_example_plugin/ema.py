"""The multi-dimensional damped exponential moving average (Ma et al., Mega, arXiv 2209.10655, section 3.1), gated.

Channel c has `state` averages s_t = alpha x_t + (1 - alpha delta) s_(t-1), whose alpha and delta are learned and lie in
(0, 1); its output y_t = sum_n eta_n s_t,n goes through W_out (silu(W_gate x) * y). What the paper calls beta is left
out: a factor of eta says the same.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.components import (
    BranchSpec,
    Context,
    Count,
    LinearModule,
    Node,
    Scope,
    State,
    accumulation_dtype,
    branches,
    constant,
    fan_in,
    normal,
)

Stream = Float[Tensor, "batch time width"]
Averages = Float[Tensor, "batch time hidden state"]


@branches.register
class Ema(BranchSpec):
    """Damped moving averages of the past, gated. `hidden` channels have `state` averages each."""

    kind: Literal["ema"] = "ema"
    hidden: Count
    state: Count = 4

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Half as wide inside."""
        yield cls(hidden=width // 2, state=3)

    def build(self, scope: Scope) -> "EmaModule":
        """The module."""
        return EmaModule(self, scope.width)

    def flops(self, scope: Scope, length: int) -> float:
        """The three maps; the averages have no matrix product."""
        return 2.0 * 3 * scope.width * self.hidden

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """The averages, in float32 or better."""
        return self.hidden * self.state * accumulation_dtype(dtype).itemsize

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Maps, then one value for each average."""
        maps = {"x.weight": ("hidden", "width"), "gate.weight": ("hidden", "width"), "out.weight": ("width", "hidden")}
        return maps | {name: ("hidden", "state") for name in ("alpha", "delta", "eta")}

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        """Axis sizes."""
        return {"width": scope.width, "hidden": self.hidden, "state": self.state}


class EmaModule(Node):
    """The module of `Ema`; alpha and delta are kept as logits."""

    def __init__(self, spec: Ema, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.x, self.gate = LinearModule(width, spec.hidden), LinearModule(width, spec.hidden)
        shape = (spec.hidden, spec.state)
        self.alpha = self.declare("alpha", shape, normal(1.0))
        self.delta = self.declare("delta", shape, constant(0.0))
        self.eta = self.declare("eta", shape, fan_in())
        self.out = LinearModule(spec.hidden, width)

    def forward(self, x: Stream, context: Context) -> Stream:
        """Average, weigh, gate."""
        x = context.encode(self.spec.encodings, x)
        y = (self._averages(self.x(x), context) * self.eta).sum(-1).to(x.dtype)
        return self.out(F.silu(self.gate(x)) * y)

    def _averages(self, x: Float[Tensor, "batch time hidden"], context: Context) -> Averages:
        precise, segments, state = accumulation_dtype(x.dtype), context.segments, self.state(context)
        alpha, delta = self.alpha.to(precise).sigmoid(), self.delta.to(precise).sigmoid()
        decay, inputs = 1 - alpha * delta, alpha * x[..., None]
        if state is None:
            return recurrence(inputs, decay, segments)
        carried = decay * state["averages"].clone()  # a copy, since backward reads what is overwritten below
        averages = recurrence(_continued(inputs, carried, segments), decay, segments)
        _remember(state["averages"], averages, segments)
        return averages

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """The averages after the last token."""
        shape = (batch, self.spec.hidden, self.spec.state)
        return {"averages": like.new_zeros(shape, dtype=accumulation_dtype(like.dtype))}


def recurrence(
    inputs: Averages, decay: Float[Tensor, "hidden state"], segments: Int[Tensor, "batch time"] | None
) -> Averages:
    """s_t = decay s_(t-1) + inputs_t, where a new segment starts from nothing.

    In log2(time) sweeps (Hillis and Steele, doi:10.1145/7902.7903): once each token has the sum over the last n
    tokens, that of the token n before it, times decay^n, makes it the sum over 2n. Two tokens of one segment have
    nothing else between them, so that comparing their segments is all that a boundary takes.
    """
    sums, reach = inputs, 1
    while reach < inputs.shape[1]:
        before = decay * sums[:, :-reach]
        if segments is not None:
            same = segments[:, reach:] == segments[:, :-reach]
            before = torch.where(same[..., None, None], before, 0)
        sums = torch.cat([sums[:, :reach], sums[:, reach:] + before], 1)
        reach, decay = 2 * reach, decay.square()
    return sums


def _continued(
    inputs: Averages, carried: Float[Tensor, "batch hidden state"], segments: Int[Tensor, "batch time"] | None
) -> Averages:
    """The inputs, what came before the chunk added to the first where it continues that (segment 0)."""
    if segments is not None:
        carried = torch.where((segments[:, 0] == 0)[:, None, None], carried, 0)
    return torch.cat([inputs[:, :1] + carried[:, None], inputs[:, 1:]], 1)


@torch.no_grad()
def _remember(
    state: Float[Tensor, "batch hidden state"], averages: Averages, segments: Int[Tensor, "batch time"] | None
) -> None:
    """Keep the averages after each row's last real token; rows of padding keep what they have."""
    if segments is None:
        state.copy_(averages[:, -1])
        return
    real = (segments >= 0).sum(1)
    last = averages[torch.arange(len(real), device=real.device), (real - 1).clamp(min=0)]
    state.copy_(torch.where((real > 0)[:, None, None], last, state))
