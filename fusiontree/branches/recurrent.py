"""What recurrent branches have in common: the short convolution, the recurrence over a chunk, how step sizes start."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from fusiontree.components import Context, Module, State, constant, fan_in
from fusiontree.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step


class Convolution(Module):
    """A short depthwise causal convolution."""

    def __init__(self, channels: int, taps: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = self.declare("weight", (channels, taps), fan_in(), decay=True)
        self.bias = self.declare("bias", (channels,), constant(0.0)) if bias else None

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        context: Context,
        past: Float[Tensor, "batch taps-1 channels"] | None,
    ) -> Float[Tensor, "batch time channels"]:
        """Convolve a chunk; `past`, the last inputs before it, is read and brought up to date."""
        if past is not None and is_step(x, context):
            return causal_conv1d_step(past, x, self.weight, self.bias)
        y, end = causal_conv1d(x, self.weight, self.bias, initial_state=past, segments=context.segments)
        if past is not None:
            past.copy_(end.detach())
        return y


def scan(
    sequence: Callable[..., tuple[Tensor, Tensor]],
    step: Callable[..., tuple[Tensor, Tensor]],
    inputs: Mapping[str, Float[Tensor, "batch time ..."]],
    context: Context,
    memory: Float[Tensor, "batch ..."] | None,
) -> Float[Tensor, "batch time ..."]:
    """Run a recurrence over a chunk, one new token of each row by `step`.

    Args:
        sequence: the operator, which takes `inputs` by name.
        step: the same for one token of each row, in place.
        inputs: everything that has a time.
        memory: the state before the chunk, which is read and brought up to date; None without a cache.
    """
    if memory is not None and is_step(next(iter(inputs.values())), context):
        y, _ = step(memory, **{name: tensor[:, 0] for name, tensor in inputs.items()})
        return y[:, None]
    y, end = sequence(**inputs, initial_state=memory, segments=context.segments)
    if memory is not None:
        memory.copy_(end.detach())
    return y


def kept(state: State | None, name: str) -> Tensor | None:
    """A part of a branch's memory; None where there is no cache."""
    return None if state is None else state[name]


def is_step(x: Tensor, context: Context) -> bool:
    """Whether every row brings one token that goes on where its states stand."""
    return context.segments is None and context.is_step(x)


def inverse_softplus_of_dt(tensor: Tensor, generator: Generator) -> None:
    """Draw dt log-uniform in [0.001, 0.1], as Mamba's code starts it, and write what softplus takes to it."""
    tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    tensor.copy_(tensor + torch.log(-torch.expm1(-tensor)))
