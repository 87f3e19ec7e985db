"""Gated DeltaNet: linear attention with a decaying state and the delta rule (arXiv 2412.06464). With a decay for each
key channel it is Kimi Delta Attention (arXiv 2510.26692).

The state of a head is S_t = A_t S_(t-1) + beta_t k_t (v_t - k_t^T A_t S_(t-1))^T, its output q_t^T S_t, normalised over
the head and times silu(z). q, k and v pass a short causal convolution; q and k are normalised to length 1.
"""

from collections.abc import Iterator, Mapping
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
    Norm,
    NormModule,
    Positive,
    Scope,
    State,
    accumulation_dtype,
    branches,
    invalid,
)
from fusiontree.kernels.gated_delta import gated_delta, gated_delta_step

Stream = Float[Tensor, "batch time width"]
Heads = Float[Tensor, "batch time heads channels"]
PerHead = Float[Tensor, "batch time heads"]
PerChannel = Float[Tensor, "batch time heads head_dim"]

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}
LENGTH_EPS = 1e-6
"""Beside the squared length of a query or key, as in every implementation: a vector of zeros stays one."""


@branches.register
class GatedDelta(ProjectedSpec):
    """Linear attention by the gated delta rule (Gated DeltaNet).

    Attributes:
        heads: of values, each with a state of head_dim x value_dim.
        key_heads: of queries and keys; values of as many heads as fall to one share it.
        head_dim: of queries and keys.
        value_dim: of values; null: head_dim.
        conv: taps.
        negative_eigenvalues: beta goes up to 2 and not only to 1, so that a state can change its sign
            (arXiv 2411.12537).
        decay: of a head's whole state, or of each channel of its keys.
        decay_rank: of the map that decays come from; null: full.
        scale: times the queries; null: head_dim ** -0.5.
        norm: of each head, before the gate.
        gate: what z goes through.
        gate_rank: of the map that z comes from; null: full.
        bias: of the maps in.
        project: false returns the heads side by side, for a fusion with a projection.
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input", "rotate"})
    rigid: ClassVar[frozenset[str]] = frozenset({"width", "conv"})
    inner_axes: ClassVar[str] = "key_heads*group_heads*value_dim"
    plain: ClassVar[frozenset[str]] = frozenset({"gate_rank", "decay_rank"})
    kind: Literal["gated_delta"] = "gated_delta"
    heads: Count
    key_heads: Count
    head_dim: Count
    value_dim: Count | None = None
    conv: Count = 4
    conv_bias: Flag = False
    negative_eigenvalues: Flag = False
    decay: Literal["head", "channel"] = "head"
    decay_rank: Count | None = None
    scale: Positive | None = None
    norm: Norm | None = Norm()
    gate: Literal["silu", "sigmoid"] = "silu"
    gate_rank: Count | None = None
    bias: Flag = False
    out_bias: Flag = False
    project: Flag = True

    @model_validator(mode="after")
    def _parts_divide(self) -> Self:
        if self.heads % self.key_heads:
            raise invalid({("key_heads",): f"{self.key_heads} key heads do not divide {self.heads} heads"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Two heads a key head, values wider than keys, beta up to 2, decays of channels, a gate of low rank."""
        shape = {"heads": 4, "key_heads": 2, "head_dim": 4, "value_dim": 3 * width // 8, "conv": 3}
        yield cls.model_validate({**shape, "decay": "channel", "decay_rank": 3, "gate": "sigmoid", "gate_rank": 2})
        yield cls.model_validate({**shape, "negative_eigenvalues": True, "bias": True, "conv_bias": True})

    @property
    def keys(self) -> int:
        """The width of all queries side by side, and of all keys."""
        return self.key_heads * self.head_dim

    @property
    def inner(self) -> int:
        """The width of all heads side by side."""
        return self.heads * (self.value_dim or self.head_dim)

    @property
    def convolved(self) -> dict[str, int]:
        """The widths of what is convolved."""
        return {"q": self.keys, "k": self.keys, "v": self.inner}

    @property
    def decays(self) -> int:
        """How many decays there are."""
        return self.heads * (self.head_dim if self.decay == "channel" else 1)

    def channels(self) -> Iterator[int]:
        """Queries and keys rotate."""
        yield self.head_dim

    def build(self, scope: Scope) -> "GatedDeltaModule":
        return GatedDeltaModule(self, scope.width)

    def flops(self, scope: Scope, length: int) -> float:
        """The maps, the convolution, and the recurrence: two reads of every state and one outer product."""
        convolved, width = sum(self.convolved.values()), scope.width
        maps = width * (convolved + self.inner * self.project + self.heads)
        for rank, rows in ((self.gate_rank, self.inner), (self.decay_rank, self.decays)):
            maps += width * rows if rank is None else rank * (width + rows)
        return 2.0 * maps + 2.0 * self.conv * convolved + 6.0 * self.inner * self.head_dim

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """The convolution's last inputs, and the states in float32 or better."""
        taps = (self.conv - 1) * sum(self.convolved.values())
        return taps * dtype.itemsize + self.inner * self.head_dim * accumulation_dtype(dtype).itemsize

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Heads run within their key head."""
        heads = "key_heads*group_heads"
        keys, values = "key_heads*head_dim", f"{heads}*value_dim"
        decays = heads if self.decay == "head" else f"{heads}*head_dim"
        rows = {"q": keys, "k": keys, "v": values, "z": values, "beta": heads, "dt": decays}
        axes: dict[str, tuple[str, ...]] = {f"{name}.weight": (row, "width") for name, row in rows.items()}
        for name, rank in (("z", "gate_rank"), ("dt", "decay_rank")):
            if getattr(self, rank):
                axes |= {f"{name}.weight": (rows[name], rank), f"{name}_down.weight": (rank, "width")}
        axes |= {f"{name}.bias": (row,) for name, row in rows.items() if name != "dt"} if self.bias else {}
        axes |= {"A_log": (heads,), "dt_bias": (decays,)}
        for name in self.convolved:
            axes[f"conv.{name}.weight"] = (rows[name], "conv")
            axes |= {f"conv.{name}.bias": (rows[name],)} if self.conv_bias else {}
        axes |= {"norm.weight": ("value_dim",)} if self.norm and self.norm.gain != "none" else {}
        return axes | self.output_axes()

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        own = {name: getattr(self, name) for name in ("key_heads", "head_dim", "conv")}
        shares = {"group_heads": self.heads // self.key_heads, "value_dim": self.value_dim or self.head_dim}
        ranks = {"gate_rank": self.gate_rank or 1, "decay_rank": self.decay_rank or 1}
        return {"width": scope.width, **own, **shares, **ranks}

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """The norm is over a head's values; queries keep the scale of the original `head_dim`."""
        left = len(keep)
        if axis == "key_heads":
            return {axis: left, "heads": left * self.heads // self.key_heads}
        if axis == "group_heads":
            return {"heads": left * self.key_heads}
        if axis == "value_dim":
            return {axis: left, "norm": self.norm and self.norm.narrowed(self.inner // self.heads, keep)}
        if axis == "head_dim":
            self.refuse_with("rotate", axis, scope)
            return {axis: left, "value_dim": self.inner // self.heads, "scale": self.scale or self.head_dim**-0.5}
        return super().narrowed_fields(axis, keep, scope)


class GatedDeltaModule(ProjectedModule):
    """The module of `GatedDelta`: q, k, v, z, beta and dt are separate parameters."""

    def __init__(self, spec: GatedDelta, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.value_dim = spec.value_dim or spec.head_dim
        self.q, self.k, self.v = (LinearModule(width, rows, bias=spec.bias) for rows in spec.convolved.values())
        self.z_down, self.dt_down = (
            LinearModule(width, rank) if rank else None for rank in (spec.gate_rank, spec.decay_rank)
        )
        self.z = LinearModule(spec.gate_rank or width, spec.inner, bias=spec.bias)
        self.beta = LinearModule(width, spec.heads, bias=spec.bias)
        self.dt = LinearModule(spec.decay_rank or width, spec.decays)
        convolutions = {n: Convolution(rows, spec.conv, bias=spec.conv_bias) for n, rows in spec.convolved.items()}
        self.conv = nn.ModuleDict(convolutions)
        self.A_log = self.declare("A_log", (spec.heads,), _log_uniform_decay)
        self.dt_bias = self.declare("dt_bias", (spec.decays,), inverse_softplus_of_dt)
        self.norm = NormModule(spec.norm, self.value_dim) if spec.norm else None
        self.add_output_map(spec, width)

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        spec, state = self.spec, self.state(context)
        x = context.encode(spec.encodings, x)
        inputs = {"q": self.q(x), "k": self.k(x), "v": self.v(x)}
        inputs = {n: F.silu(self.conv[n](u, context, kept(state, f"conv.{n}"))) for n, u in inputs.items()}
        q, k = (self._direction(inputs[name], context) for name in ("q", "k"))
        v = inputs["v"].unflatten(2, (spec.heads, self.value_dim))
        g, beta = self._rates(x)
        rule = {"q": q * (spec.scale or spec.head_dim**-0.5), "k": k, "v": v, "g": g, "beta": beta}
        y = scan(gated_delta, gated_delta_step, rule, context, kept(state, "delta"))
        y = (y if self.norm is None else self.norm(y)).flatten(2)
        y = y * GATES[spec.gate](self.z(x if self.z_down is None else self.z_down(x)))
        return self.projected(y)

    def _direction(self, x: Float[Tensor, "batch time keys"], context: Context) -> Heads:
        """Queries or keys by head, of length 1."""
        heads = x.unflatten(2, (self.spec.key_heads, self.spec.head_dim))
        precise = heads.to(accumulation_dtype(x.dtype))
        unit = precise * torch.rsqrt(precise.square().sum(-1, keepdim=True) + LENGTH_EPS)
        return context.rotate(self.spec.encodings, unit.to(x.dtype))

    def _rates(self, x: Stream) -> tuple[PerHead | PerChannel, PerHead]:
        """The log of the decay, and beta, in float32 or better."""
        precise, spec = accumulation_dtype(x.dtype), self.spec
        beta = torch.sigmoid(self.beta(x).to(precise))
        rates = self.dt(x if self.dt_down is None else self.dt_down(x))
        dt, decay = F.softplus(rates.to(precise) + self.dt_bias.to(precise)), torch.exp(self.A_log.to(precise))
        if spec.decay == "channel":
            dt, decay = dt.unflatten(2, (spec.heads, spec.head_dim)), decay[:, None]
        return -decay * dt, 2 * beta if spec.negative_eigenvalues else beta

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """The last inputs of each convolution, oldest first, and the heads' states."""
        spec = self.spec
        taps = {f"conv.{name}": like.new_zeros(batch, spec.conv - 1, rows) for name, rows in spec.convolved.items()}
        shape = (batch, spec.heads, spec.head_dim, self.value_dim)
        return taps | {"delta": like.new_zeros(shape, dtype=accumulation_dtype(like.dtype))}


def _log_uniform_decay(tensor: Tensor, generator: Generator) -> None:
    """A uniform in (0, 16], as the paper's code starts it, but for what is next to 0."""
    tensor.uniform_(0.01, 16.0, generator=generator).log_()
