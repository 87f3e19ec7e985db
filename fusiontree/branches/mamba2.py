"""Mamba-2: a selective state-space model with a scalar decay a head (SSD; Dao and Gu, arXiv 2405.21060).

The state of a head is S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T, its output y_t = S_t C_t + D x_t, with x, B and
C behind a short causal convolution and heads sharing B and C within a group.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import model_validator
from torch import Generator, Tensor, nn

from fusiontree.branches.projected import ProjectedModule, ProjectedSpec
from fusiontree.branches.recurrent import Convolution, inverse_softplus_of_dt, kept, scan
from fusiontree.components import (
    Context,
    Count,
    Flag,
    Hook,
    LinearModule,
    NonNegative,
    Norm,
    NormModule,
    Positive,
    Real,
    Scope,
    Spec,
    SpecError,
    State,
    accumulation_dtype,
    axes,
    branches,
    constant,
    invalid,
    scaled,
)
from fusiontree.kernels.ssd import ssd, ssd_step

Stream = Float[Tensor, "batch time width"]
Inner = Float[Tensor, "batch time inner"]


class GatedNorm(Norm):
    """A norm beside the gate silu(z), over each of `groups` parts of the heads' features: norm(y * silu(z)), or,
    with `order: norm_first`, norm(y) * silu(z)."""

    groups: Count = 1
    order: Literal["gate_first", "norm_first"] = "gate_first"

    def narrowed(self, width: int, kept: Sequence[int]) -> Self:
        """Of equal groups, or without some of them.

        Raises:
            SpecError: groups of unequal size would be left.
        """
        size = width // self.groups
        left = Counter(index // size for index in kept)
        if len(set(left.values())) > 1:
            raise SpecError(f"the norm's {self.groups} groups would not stay equal")
        whole = set(left.values()) == {size}
        narrower = self if whole else super().narrowed(size, kept)
        return narrower.model_copy(update={"groups": len(left)})


class Mamba2Multipliers(Spec):
    """Constants times the branch's input and times what its maps in give (muP; Falcon-H1, arXiv 2507.22448)."""

    input: Real = 1.0
    z: Real = 1.0
    x: Real = 1.0
    B: Real = 1.0
    C: Real = 1.0
    dt: Real = 1.0


@branches.register
class Mamba2(ProjectedSpec):
    """A state-space model with a scalar decay a head (SSD).

    `heads` of `head_dim` channels with `state` entries each, in `groups` that share B and C; `conv` taps. dt is
    cut to `dt_limit`. Without a `norm` the output is y * silu(z) (Falcon-H1). `bias` is that of the maps in.
    `project: false` returns the heads' features, for a fusion with a projection.
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input", "rotate"})
    rigid: ClassVar[frozenset[str]] = frozenset({"width", "conv"})
    inner_axes: ClassVar[str] = "groups*group_heads*head_dim"
    kind: Literal["mamba2"] = "mamba2"
    heads: Count
    head_dim: Count
    state: Count
    groups: Count = 1
    conv: Count = 4
    conv_bias: Flag = True
    dt_limit: tuple[NonNegative, Positive | None] = (0.0, None)
    norm: GatedNorm | None = GatedNorm()
    bias: Flag = False
    out_bias: Flag = False
    project: Flag = True
    multipliers: Mamba2Multipliers = Mamba2Multipliers()

    @model_validator(mode="after")
    def _parts_divide(self) -> Self:
        low, high = self.dt_limit
        if high is not None and low > high:
            raise invalid({("dt_limit",): f"from {low} up to {high} there is nothing"})
        if self.heads % self.groups:
            raise invalid({("groups",): f"{self.groups} groups do not divide {self.heads} heads"})
        if self.norm and self.inner % self.norm.groups:
            raise invalid({("norm", "groups"): f"{self.norm.groups} groups do not divide {self.inner} features"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Two groups of two heads, dt cut on both sides."""
        yield cls(heads=4, head_dim=3 * width // 8, state=8, groups=2, conv=3, dt_limit=(0.01, 0.5))

    @property
    def inner(self) -> int:
        """The width of all heads side by side."""
        return self.heads * self.head_dim

    @property
    def bc_width(self) -> int:
        """The width of B, and of C, in all groups."""
        return self.groups * self.state

    def channels(self) -> Iterator[int]:
        """B and C rotate."""
        yield self.state

    def build(self, scope: Scope) -> "Mamba2Module":
        return Mamba2Module(self, scope.width)

    def flops(self, scope: Scope, length: int) -> float:
        """The maps, the convolution, and the recurrence: one outer product and one read of every state."""
        maps = 2 * self.inner + 2 * self.bc_width + self.heads + (self.inner if self.project else 0)
        convolution = self.conv * (self.inner + 2 * self.bc_width)
        return 2.0 * scope.width * maps + 2.0 * convolution + 4.0 * self.inner * self.state

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """The convolution's last inputs, and the states in float32 or better."""
        taps = (self.conv - 1) * (self.inner + 2 * self.bc_width)
        return taps * dtype.itemsize + self.inner * self.state * accumulation_dtype(dtype).itemsize

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Heads run within their group."""
        heads = "groups*group_heads"
        rows = {"z": f"{heads}*head_dim", "x": f"{heads}*head_dim", "B": "groups*state", "C": "groups*state"}
        maps = rows | {"dt": heads}
        axes: dict[str, tuple[str, ...]] = {f"{name}.weight": (row, "width") for name, row in maps.items()}
        axes |= {f"{name}.bias": (row,) for name, row in maps.items()} if self.bias else {}
        axes |= {name: (heads,) for name in ("A_log", "D", "dt_bias")}
        for name in ("x", "B", "C"):
            axes[f"conv.{name}.weight"] = (rows[name], "conv")
            axes |= {f"conv.{name}.bias": (rows[name],)} if self.conv_bias else {}
        axes |= {"norm.weight": (rows["x"],)} if self.norm and self.norm.gain != "none" else {}
        return axes | self.output_axes()

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        own = {name: getattr(self, name) for name in ("groups", "head_dim", "state", "conv")}
        return {"width": scope.width, "group_heads": self.heads // self.groups, **own}

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """The norm stands over all heads."""
        if axis == "state":
            self.refuse_with("rotate", axis, scope)
            return {axis: len(keep)}
        if axis not in axes.names([self.inner_axes]):
            return super().narrowed_fields(axis, keep, scope)
        left = {**self.sizes(scope), axis: len(keep)}
        fields: dict[str, Any] = {name: left[name] for name in ("groups", "head_dim")}
        fields["heads"] = left["groups"] * left["group_heads"]
        if self.norm:
            fields["norm"] = self.norm.narrowed(self.inner, self.kept_along(self.inner_axes, axis, keep, scope))
        return fields


class Mamba2Module(ProjectedModule):
    """The module of `Mamba2`: z, x, B, C and dt are separate parameters."""

    def __init__(self, spec: Mamba2, width: int) -> None:
        super().__init__()
        self.spec = spec
        convolved = {"x": spec.inner, "B": spec.bc_width, "C": spec.bc_width}
        self.z = LinearModule(width, spec.inner, bias=spec.bias)
        self.x, self.B, self.C = (LinearModule(width, rows, bias=spec.bias) for rows in convolved.values())
        self.dt = LinearModule(width, spec.heads, bias=spec.bias)
        convolutions = {n: Convolution(rows, spec.conv, bias=spec.conv_bias) for n, rows in convolved.items()}
        self.conv = nn.ModuleDict(convolutions)
        self.A_log = self.declare("A_log", (spec.heads,), _log_uniform_decay)
        self.D = self.declare("D", (spec.heads,), constant(1.0))
        self.dt_bias = self.declare("dt_bias", (spec.heads,), inverse_softplus_of_dt)
        self.norm = NormModule(spec.norm, spec.inner, groups=spec.norm.groups) if spec.norm else None
        self.add_output_map(spec, width)

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        spec, state = self.spec, self.state(context)
        times = spec.multipliers
        x = scaled(context.encode(spec.encodings, x), times.input)
        z, dt = scaled(self.z(x), times.z), self._step_sizes(scaled(self.dt(x), times.dt))
        inputs = {"x": scaled(self.x(x), times.x), "B": scaled(self.B(x), times.B), "C": scaled(self.C(x), times.C)}
        inputs = {n: F.silu(self.conv[n](u, context, kept(state, f"conv.{n}"))) for n, u in inputs.items()}
        u = inputs["x"].unflatten(2, (spec.heads, spec.head_dim))
        B, C = (inputs[name].unflatten(2, (spec.groups, spec.state)) for name in ("B", "C"))
        B, C = context.rotate(spec.encodings, B), context.rotate(spec.encodings, C)
        y = self._scan({"x": u, "dt": dt, "B": B, "C": C}, context, state) + u * self.D[:, None].to(u.dtype)
        y = self._gated(y.flatten(2), z)
        return self.projected(y)

    def _step_sizes(self, dt: Float[Tensor, "batch time heads"]) -> Float[Tensor, "batch time heads"]:
        """softplus(dt + bias), cut to the limits, in float32 or better."""
        precise = accumulation_dtype(dt.dtype)
        low, high = self.spec.dt_limit
        return F.softplus(dt.to(precise) + self.dt_bias.to(precise)).clamp(low, high)

    def _scan(self, inputs: Mapping[str, Tensor], context: Context, state: State | None) -> Tensor:
        A = -torch.exp(self.A_log.to(inputs["dt"].dtype))
        return scan(partial(ssd, A=A), partial(ssd_step, A=A), inputs, context, kept(state, "ssm"))

    def _gated(self, y: Inner, z: Inner) -> Inner:
        gate = F.silu(z)
        if self.norm is None or self.spec.norm is None:
            return y * gate
        return self.norm(y * gate) if self.spec.norm.order == "gate_first" else self.norm(y) * gate

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """The last inputs of each convolution, oldest first, and the heads' states."""
        spec = self.spec
        widths = {"x": spec.inner, "B": spec.bc_width, "C": spec.bc_width}
        taps = {f"conv.{name}": like.new_zeros(batch, spec.conv - 1, width) for name, width in widths.items()}
        shape = (batch, spec.heads, spec.head_dim, spec.state)
        return taps | {"ssm": like.new_zeros(shape, dtype=accumulation_dtype(like.dtype))}


def _log_uniform_decay(tensor: Tensor, generator: Generator) -> None:
    """A uniform in [1, 16], as the paper's code starts it."""
    tensor.uniform_(1.0, 16.0, generator=generator).log_()
