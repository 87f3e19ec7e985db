"""Lightning attention: linear attention whose heads forget at constant rates (TransNormerLLM, arXiv 2307.14995;
MiniMax-01, arXiv 2501.08313).

The state of a head is S_t = exp(-slope) S_(t-1) + v_t k_t^T, its output S_t q_t, where q, k and v pass silu. The
outputs of all heads are normalised as one vector and multiplied by sigmoid(z).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from fusiontree.branches.projected import ProjectedModule, ProjectedSpec
from fusiontree.branches.recurrent import kept, scan
from fusiontree.components import (
    Context,
    Count,
    Flag,
    Hook,
    LinearModule,
    NonNegative,
    Norm,
    NormModule,
    Scope,
    State,
    accumulation_dtype,
    axes,
    branches,
    invalid,
)
from fusiontree.kernels.common.constants import constants
from fusiontree.kernels.ssd import ssd, ssd_step

Stream = Float[Tensor, "batch time width"]
Heads = Float[Tensor, "batch time heads channels"]


@branches.register
class Lightning(ProjectedSpec):
    """Linear attention with a constant decay a head (MiniMax-01).

    Attributes:
        heads: each with a state of value_dim x head_dim.
        head_dim: of queries and keys.
        value_dim: of values; null: head_dim.
        slopes: how fast each head forgets: a token that came n tokens ago counts exp(-slope n).
        norm: of all heads together, before sigmoid(z).
        bias: of the maps in.
        project: false returns the heads side by side, for a fusion with a projection.
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input", "rotate"})
    rigid: ClassVar[frozenset[str]] = frozenset({"width", "heads"})
    inner_axes: ClassVar[str] = "heads*value_dim"
    kind: Literal["lightning"] = "lightning"
    heads: Count
    head_dim: Count
    value_dim: Count | None = None
    slopes: tuple[NonNegative, ...]
    norm: Norm = Norm()
    bias: Flag = False
    out_bias: Flag = False
    project: Flag = True

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if len(self.slopes) != self.heads:
            raise invalid({("slopes",): f"expected one for each of {self.heads} heads, found {len(self.slopes)}"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Three heads, one without decay, values wider than keys, with biases."""
        shape = {"heads": 3, "head_dim": 4, "value_dim": width // 2, "slopes": (0.0, 0.1, 0.7)}
        yield cls.model_validate({**shape, "bias": True, "out_bias": True})

    @property
    def keys(self) -> int:
        """The width of all queries side by side, and of all keys."""
        return self.heads * self.head_dim

    @property
    def inner(self) -> int:
        """The width of all heads side by side."""
        return self.heads * (self.value_dim or self.head_dim)

    @property
    def maps(self) -> dict[str, int]:
        """The rows of the maps in."""
        return {"q": self.keys, "k": self.keys, "v": self.inner, "z": self.inner}

    def channels(self) -> Iterator[int]:
        """Queries and keys rotate."""
        yield self.head_dim

    def build(self, scope: Scope) -> "LightningModule":
        return LightningModule(self, scope.width)

    def flops(self, scope: Scope, length: int) -> float:
        """The maps, and the recurrence: one outer product and one read of every state."""
        maps = sum(self.maps.values()) + (self.inner if self.project else 0)
        return 2.0 * scope.width * maps + 4.0 * self.inner * self.head_dim

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """The states in float32 or better."""
        return self.inner * self.head_dim * accumulation_dtype(dtype).itemsize

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Heads have an order, that of the slopes."""
        keys, values = "heads*head_dim", "heads*value_dim"
        rows = {"q": keys, "k": keys, "v": values, "z": values}
        axes: dict[str, tuple[str, ...]] = {f"{name}.weight": (row, "width") for name, row in rows.items()}
        axes |= {f"{name}.bias": (row,) for name, row in rows.items()} if self.bias else {}
        axes |= {"norm.weight": (values,)} if self.norm.gain != "none" else {}
        return axes | self.output_axes()

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        own = {"heads": self.heads, "head_dim": self.head_dim, "value_dim": self.value_dim or self.head_dim}
        return {"width": scope.width, **own}

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """The norm stands over all heads' values."""
        if axis == "head_dim":
            self.refuse_with("rotate", axis, scope)
            return {axis: len(keep), "value_dim": self.value_dim or self.head_dim}
        if axis not in axes.names([self.inner_axes]):
            return super().narrowed_fields(axis, keep, scope)
        slopes = tuple(self.slopes[head] for head in keep) if axis == "heads" else self.slopes
        norm = self.norm.narrowed(self.inner, self.kept_along(self.inner_axes, axis, keep, scope))
        return {axis: len(keep), "slopes": slopes, "norm": norm}


class LightningModule(ProjectedModule):
    """The module of `Lightning`: q, k, v and z are separate parameters."""

    def __init__(self, spec: Lightning, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.q, self.k, self.v, self.z = (LinearModule(width, rows, bias=spec.bias) for rows in spec.maps.values())
        self.norm = NormModule(spec.norm, spec.inner)
        self.add_output_map(spec, width)

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        spec = self.spec
        x = context.encode(spec.encodings, x)
        maps = (self.q, self.k, self.v)
        q, k, v = (F.silu(to(x)).unflatten(2, (spec.heads, -1)) for to in maps)
        q, k = context.rotate(spec.encodings, q), context.rotate(spec.encodings, k)
        y = self._scan((q, k, v), context, self.state(context)).flatten(2)
        y = torch.sigmoid(self.z(x)) * self.norm(y)
        return self.projected(y)

    def _scan(self, qkv: tuple[Heads, Heads, Heads], context: Context, state: State | None) -> Heads:
        """`ssd` with dt = 1, keys as B and queries as C."""
        (q, k, v), precise = qkv, accumulation_dtype(qkv[2].dtype)
        rates = constants(tuple(-slope for slope in self.spec.slopes), precise, v.device)
        steps = context.once(_ones, v.shape[:3], precise, v.device)
        inputs = {"x": v, "dt": steps, "B": k, "C": q}
        return scan(partial(ssd, A=rates), partial(ssd_step, A=rates), inputs, context, kept(state, "state"))

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        spec = self.spec
        shape = (batch, spec.heads, spec.value_dim or spec.head_dim, spec.head_dim)
        return {"state": like.new_zeros(shape, dtype=accumulation_dtype(like.dtype))}


def _ones(context: Context, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Steps of 1 [batch, time, heads]."""
    return torch.ones(shape, dtype=dtype, device=device)
