"""Mamba: a selective state-space model where each channel has a state and rates of decay of its own (S6; Gu and Dao,
arXiv 2312.00752).

The state of a channel is h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t, its output y_t = h_t . C_t + D x_t, times silu(z).
x passes a short causal convolution; dt, B and C are linear maps of its output. All channels share B and C; the map of
dt has a low rank.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Generator, Tensor, nn

from fusiontree.branches.projected import ProjectedModule, ProjectedSpec
from fusiontree.branches.recurrent import Convolution, inverse_softplus_of_dt, kept, scan
from fusiontree.components import (
    Context,
    Count,
    Flag,
    LinearModule,
    Norm,
    NormModule,
    Scope,
    State,
    accumulation_dtype,
    branches,
    constant,
)
from fusiontree.kernels.selective_scan import selective_scan, selective_scan_step

Stream = Float[Tensor, "batch time width"]
Inner = Float[Tensor, "batch time inner"]
Shared = Float[Tensor, "batch time state"]


class SelectionNorm(Norm):
    """A norm of dt before it leaves the low rank, one of B and one of C; `state_count` is the `count` of the last
    two."""

    state_count: Count | None = None

    @property
    def of_states(self) -> Norm:
        """That of B and C."""
        return self.model_copy(update={"count": self.state_count})


@branches.register
class Mamba1(ProjectedSpec):
    """A state-space model whose every channel decays at rates of its own (S6).

    Attributes:
        inner: channels, each with `state` entries.
        conv: taps.
        rank: of the map that makes dt (`dt_rank`); a sixteenth of the width in the paper.
        norm: of dt before it leaves the low rank, of B and of C (Jamba, arXiv 2403.19887; without a gain in
            FalconMamba, arXiv 2410.05355).
        bias: of the maps in.
        project: false returns the channels, for a fusion with a projection.
    """

    rigid: ClassVar[frozenset[str]] = frozenset({"width", "conv"})
    inner_axes: ClassVar[str] = "inner"
    plain: ClassVar[frozenset[str]] = frozenset({"inner"})
    kind: Literal["mamba1"] = "mamba1"
    inner: Count
    state: Count
    rank: Annotated[Count, Field(description="the rank of the map that makes dt")]
    conv: Count = 4
    conv_bias: Flag = True
    norm: SelectionNorm | None = None
    bias: Flag = False
    out_bias: Flag = False
    project: Flag = True

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """As wide as no other part, with norms and every bias."""
        yield cls(inner=3 * width // 2, state=4, rank=3, conv=3, norm=SelectionNorm(), bias=True, out_bias=True)

    def build(self, scope: Scope) -> "Mamba1Module":
        return Mamba1Module(self, scope.width)

    def flops(self, scope: Scope, length: int) -> float:
        """The maps, the convolution, and the recurrence: one outer product and one read of every state."""
        maps = scope.width * (3 if self.project else 2) + 2 * self.rank + 2 * self.state
        return self.inner * (2.0 * maps + 2.0 * self.conv + 4.0 * self.state)

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """The convolution's last inputs, and the states in float32 or better."""
        return self.inner * ((self.conv - 1) * dtype.itemsize + self.state * accumulation_dtype(dtype).itemsize)

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Everything but the norms runs over the channels."""
        axes: dict[str, tuple[str, ...]] = {f"{name}.weight": ("inner", "width") for name in ("z", "x")}
        axes |= {f"{name}.bias": ("inner",) for name in ("z", "x")} if self.bias else {}
        axes |= {"conv.weight": ("inner", "conv")} | ({"conv.bias": ("inner",)} if self.conv_bias else {})
        axes |= {"dt_down.weight": ("rank", "inner"), "dt_up.weight": ("inner", "rank"), "dt_bias": ("inner",)}
        axes |= {f"{name}.weight": ("state", "inner") for name in ("B", "C")}
        axes |= {"A_log": ("inner", "state"), "D": ("inner",)}
        if self.norm and self.norm.gain != "none":
            axes |= {"norm.dt.weight": ("rank",), "norm.B.weight": ("state",), "norm.C.weight": ("state",)}
        return axes | self.output_axes()

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        return {"width": scope.width, **{name: getattr(self, name) for name in ("inner", "state", "rank", "conv")}}

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """Norms stand over the rank and over the state's entries."""
        if axis not in ("rank", "state"):
            return super().narrowed_fields(axis, keep, scope)
        fields: dict[str, Any] = {axis: len(keep)}
        if self.norm and axis == "rank":
            fields["norm"] = self.norm.narrowed(self.rank, keep)
        elif self.norm:
            count = self.norm.of_states.narrowed(self.state, keep).count
            fields["norm"] = self.norm.model_copy(update={"state_count": count})
        return fields


class Mamba1Module(ProjectedModule):
    """The module of `Mamba1`: z, x, dt, B and C are separate parameters."""

    def __init__(self, spec: Mamba1, width: int) -> None:
        super().__init__()
        self.spec = spec
        shared = {"dt": spec.rank, "B": spec.state, "C": spec.state}
        self.z, self.x = (LinearModule(width, spec.inner, bias=spec.bias) for _ in ("z", "x"))
        self.conv = Convolution(spec.inner, spec.conv, bias=spec.conv_bias)
        self.dt_down, self.B, self.C = (LinearModule(spec.inner, rows) for rows in shared.values())
        norms = {"dt": spec.norm, "B": spec.norm.of_states, "C": spec.norm.of_states} if spec.norm else {}
        self.norm = nn.ModuleDict({name: NormModule(norm, shared[name]) for name, norm in norms.items()})
        self.dt_up = LinearModule(spec.rank, spec.inner, init=_uniform_of_rank)
        self.dt_bias = self.declare("dt_bias", (spec.inner,), inverse_softplus_of_dt)
        self.A_log = self.declare("A_log", (spec.inner, spec.state), _log_of_one_to_state)
        self.D = self.declare("D", (spec.inner,), constant(1.0))
        self.add_output_map(spec, width)

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        state = self.state(context)
        x = context.encode(self.spec.encodings, x)
        u = F.silu(self.conv(self.x(x), context, kept(state, "conv")))
        y = self._scan(u, context, state) + u * self.D.to(u.dtype)
        y = y * F.silu(self.z(x))
        return self.projected(y)

    def _selected(self, u: Inner) -> tuple[Inner, Shared, Shared]:
        """dt (in float32 or better), B and C from the input."""
        found = {"dt": self.dt_down(u), "B": self.B(u), "C": self.C(u)}
        found |= {name: norm(found[name]) for name, norm in self.norm.items()}
        precise = accumulation_dtype(u.dtype)
        dt = F.softplus(self.dt_up(found["dt"]).to(precise) + self.dt_bias.to(precise))
        return dt, found["B"], found["C"]

    def _scan(self, u: Inner, context: Context, state: State | None) -> Inner:
        dt, B, C = self._selected(u)
        A, inputs = -torch.exp(self.A_log.to(dt.dtype)), {"x": u, "dt": dt, "B": B, "C": C}
        return scan(
            partial(selective_scan, A=A), partial(selective_scan_step, A=A), inputs, context, kept(state, "ssm")
        )

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """The convolution's last inputs, oldest first, and the channels' states."""
        spec = self.spec
        ssm = like.new_zeros((batch, spec.inner, spec.state), dtype=accumulation_dtype(like.dtype))
        return {"conv": like.new_zeros(batch, spec.conv - 1, spec.inner), "ssm": ssm}


def _log_of_one_to_state(tensor: Tensor, generator: Generator) -> None:
    """A = -1, -2, ..., as the paper's code starts it (S4D-real, arXiv 2206.11893)."""
    tensor.copy_(torch.arange(1.0, tensor.shape[-1] + 1).log().expand_as(tensor))


def _uniform_of_rank(tensor: Tensor, generator: Generator) -> None:
    """Uniform in +-rank^-1/2, as the paper's code starts it, so that dt varies as much for every rank."""
    limit = tensor.shape[-1] ** -0.5
    tensor.uniform_(-limit, limit, generator=generator)
