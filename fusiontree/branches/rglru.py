"""RG-LRU, the recurrent block of Griffin (arXiv 2402.19427): a gated linear recurrence a channel.

With i and r, the input and the recurrence gate, sigmoids of maps within a head, the state of a channel is
h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t u_t with a_t = exp(-8 softplus(Lambda) r_t), where u stands behind a short
causal convolution without an activation. At the first token of a document the factor is 1 and not sqrt(1 - a^2). The
output is W_out (h * gelu(z)).
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from fusiontree.branches.projected import ProjectedModule, ProjectedSpec
from fusiontree.branches.recurrent import Convolution, kept, scan
from fusiontree.components import (
    Context,
    Count,
    Flag,
    LinearModule,
    Module,
    Scope,
    State,
    accumulation_dtype,
    branches,
    constant,
    fan_in,
    products,
)
from fusiontree.kernels.linear_recurrence import linear_recurrence, linear_recurrence_step

Stream = Float[Tensor, "batch time width"]
Inner = Float[Tensor, "batch time inner"]

SHARPNESS = 8.0
"""c of the paper: how far an open recurrence gate raises what is kept to a power."""
STEEPEST = 1000.0
"""The largest slope of sqrt(1 - a^2) that is passed on, as in the paper's code: at a = 1 there is no bound."""
MAPS = ("x", "z")
GATES = ("input_gate", "recurrence_gate")


@branches.register
class RgLru(ProjectedSpec):
    """A real-gated linear recurrent unit (Griffin, RecurrentGemma).

    Attributes:
        heads: groups of channels; gates of a channel read those of its head.
        head_dim: channels of a head.
        conv: taps.
        bias: of the maps in; the gates always have one.
        project: false returns the channels, for a fusion with a projection.
    """

    rigid: ClassVar[frozenset[str]] = frozenset({"width", "conv"})
    plain: ClassVar[frozenset[str]] = frozenset({"heads", "head_dim"})
    inner_axes: ClassVar[str] = "heads*head_dim"
    kind: Literal["rglru"] = "rglru"
    heads: Count
    head_dim: Count
    conv: Count = 4
    conv_bias: Flag = True
    bias: Flag = False
    out_bias: Flag = False
    project: Flag = True

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Three heads, with every bias."""
        yield cls(heads=3, head_dim=width // 2, conv=3, bias=True, out_bias=True)

    @property
    def inner(self) -> int:
        """The channels of all heads."""
        return self.heads * self.head_dim

    def build(self, scope: Scope) -> "RgLruModule":
        return RgLruModule(self, scope.width)

    def flops(self, scope: Scope, length: int) -> float:
        """The maps, the convolution and the gates; the recurrence has no matrix product."""
        maps = 3 if self.project else 2
        return 2.0 * self.inner * (maps * scope.width + self.conv + 2 * self.head_dim)

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """The convolution's last inputs, and the states in float32 or better."""
        return self.inner * ((self.conv - 1) * dtype.itemsize + accumulation_dtype(dtype).itemsize)

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Everything runs over the channels, by head."""
        inner = "heads*head_dim"
        axes: dict[str, tuple[str, ...]] = {f"{name}.weight": (inner, "width") for name in MAPS}
        axes |= {f"{name}.bias": (inner,) for name in MAPS} if self.bias else {}
        axes |= {"conv.weight": (inner, "conv")} | ({"conv.bias": (inner,)} if self.conv_bias else {})
        axes |= {f"{name}.weight": ("heads", "head_dim", "head_dim") for name in GATES}
        axes |= {f"{name}.bias": ("heads", "head_dim") for name in GATES} | {"Lambda": (inner,)}
        return axes | self.output_axes()

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        return {"width": scope.width, **{name: getattr(self, name) for name in ("heads", "head_dim", "conv")}}


class HeadGate(Module):
    """The sigmoid of a linear map within each head; `weight` [heads, from, to]."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = self.declare("weight", (heads, head_dim, head_dim), fan_in(0.1), decay=True)
        self.bias = self.declare("bias", (heads, head_dim), constant(0.0))

    def forward(self, x: Inner) -> Inner:
        """A number in (0, 1) for each channel, in float32 or better."""
        by_head = x.flatten(0, 1).unflatten(1, self.weight.shape[:2]).transpose(0, 1)
        logits = products.batched(by_head, self.weight, self.bias).transpose(0, 1)
        return torch.sigmoid(logits.reshape(x.shape).to(accumulation_dtype(x.dtype)))


class RgLruModule(ProjectedModule):
    """The module of `RgLru`."""

    def __init__(self, spec: RgLru, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.x, self.z = (LinearModule(width, spec.inner, bias=spec.bias) for _ in MAPS)
        self.conv = Convolution(spec.inner, spec.conv, bias=spec.conv_bias)
        self.input_gate, self.recurrence_gate = (HeadGate(spec.heads, spec.head_dim) for _ in GATES)
        self.Lambda = self.declare("Lambda", (spec.inner,), _slow_decay)
        self.add_output_map(spec, width)

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        state = self.state(context)
        x = context.encode(self.spec.encodings, x)
        u = self.conv(self.x(x), context, kept(state, "conv"))
        y = self._remembered(u, context, state) * F.gelu(self.z(x), approximate="tanh")
        return self.projected(y)

    def _remembered(self, u: Inner, context: Context, state: State | None) -> Inner:
        inflow, decay = self._gated(u, context)
        inputs, memory = {"x": inflow, "a": decay}, kept(state, "state")
        return scan(linear_recurrence, linear_recurrence_step, inputs, context, memory).to(u.dtype)

    def _gated(self, u: Inner, context: Context) -> tuple[Inner, Inner]:
        """What is added to the state and what is kept of it, in float32 or better."""
        precise = accumulation_dtype(u.dtype)
        log = -SHARPNESS * self.recurrence_gate(u) * F.softplus(self.Lambda.to(precise))
        share = _bounded_sqrt(-torch.expm1(2 * log))
        share = torch.where(context.once(_firsts), 1.0, share)
        return self.input_gate(u) * u.to(precise) * share, torch.exp(log)

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """The convolution's last inputs, oldest first, and the channels' states."""
        spec = self.spec
        state = like.new_zeros((batch, spec.inner), dtype=accumulation_dtype(like.dtype))
        return {"conv": like.new_zeros(batch, spec.conv - 1, spec.inner), "state": state}


def _firsts(context: Context) -> Bool[Tensor, "batch time 1"]:
    """Where documents have their first token."""
    return (context.positions == 0)[..., None]


def _bounded_sqrt(x: Tensor) -> Tensor:
    """The square root, with a slope that can be learned from."""
    return _BoundedSqrt.apply(x) if torch.is_grad_enabled() else x.sqrt()


class _BoundedSqrt(torch.autograd.Function):
    """The square root; its slope is at most `STEEPEST`, so that what keeps everything can still be learned."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grads[0] / (2 * root).clamp(min=1 / STEEPEST)


def _slow_decay(tensor: Tensor, generator: Generator) -> None:
    """exp(-2 softplus(Lambda)) uniform in [0.9^2, 0.999^2], as the paper's code starts it: a ring, as of LRU
    (arXiv 2303.06349)."""
    tensor.uniform_(0.9**2, 0.999**2, generator=generator).log_().mul_(-0.5)
    tensor.copy_(torch.log(torch.expm1(tensor)))
