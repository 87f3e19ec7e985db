"""What state-space branches have in common: the short convolution in front, and how step sizes start."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from fusiontree.core.context import Context
from fusiontree.core.contracts import State
from fusiontree.core.modules import Module, constant, fan_in
from fusiontree.kernels import causal_conv1d, causal_conv1d_step


class Convolution(Module):
    """A short depthwise causal convolution of `taps` taps, and SiLU."""

    def __init__(self, channels: int, taps: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = self.declare("weight", (channels, taps), fan_in())
        self.bias = self.declare("bias", (channels,), constant(0.0)) if bias else None

    def forward(
        self, x: Float[Tensor, "batch time channels"], context: Context, state: State | None, key: str
    ) -> Float[Tensor, "batch time channels"]:
        """Convolve a chunk; `state[key]` [batch, taps-1, channels] is read and brought up to date."""
        start = None if state is None else state[key]
        if start is not None and is_step(x, context):
            return F.silu(causal_conv1d_step(start, x[:, 0], self.weight, self.bias))[:, None]
        y, end = causal_conv1d(x, self.weight, self.bias, initial_state=start, segments=context.segments)
        if start is not None:
            start.copy_(end.detach())
        return F.silu(y)


def is_step(x: Tensor, context: Context) -> bool:
    """Whether every row brings one token that goes on where its states stand."""
    return context.segments is None and context.is_step(x)


def inverse_softplus_of_dt(tensor: Tensor, generator: Generator) -> None:
    """Draw dt log-uniform in [0.001, 0.1], as Mamba's code starts it, and write what softplus takes to it."""
    tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    tensor.copy_(tensor + torch.log(-torch.expm1(-tensor)))
