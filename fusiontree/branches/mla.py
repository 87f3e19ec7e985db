"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads are linear maps of one
latent, and that is all that a cache holds of them.

A head's key has `head_dim` channels made from the latent and `shared_dim` channels that are the same for all heads;
only those rotate, since a rotation of the others would stand between the latent and its maps. So decoding needs no keys
and values: queries go through the maps of the keys, and what is read from the latents through the maps of the values.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from fusiontree.branches import kv_cache
from fusiontree.branches.attention import Group, mean_visible
from fusiontree.branches.projected import ProjectedModule, ProjectedSpec
from fusiontree.components import (
    Context,
    Count,
    Flag,
    Hook,
    LinearModule,
    Module,
    Norm,
    NormModule,
    Positive,
    Scope,
    State,
    branches,
    fan_in,
    products,
)
from fusiontree.kernels.attention import Past, attention, attention_step

Stream = Float[Tensor, "batch time width"]
Heads = Float[Tensor, "batch time heads channels"]
Memory = Float[Tensor, "batch time rank+shared_dim"]
"""Of each token what its keys and values are made of: the latent, then the shared channels of the keys."""


class LatentNorm(Norm):
    """A norm of the latent of keys and values and one of that of queries; `query_count` is the `count` of the
    second."""

    query_count: Count | None = None

    @property
    def of_queries(self) -> Norm:
        """That of the latent of queries."""
        return self.model_copy(update={"count": self.query_count})


@branches.register
class Mla(ProjectedSpec):
    """Multi-head latent attention.

    Attributes:
        head_dim: channels of queries and keys that each head makes of its own.
        shared_dim: further channels, of which all heads have the same key; they rotate.
        value_dim: of values; null: head_dim.
        rank: of the latent that keys and values are made from.
        query_rank: of one that queries are made from; null: they are made from the stream.
        norm: of both latents.
        window: visible keys, the query's own included; null: all.
        scale: of the scores; null: (head_dim + shared_dim) ** -0.5.
        bias: of the maps to the latents and to the shared keys.
        project: false returns the heads side by side, for a fusion with a projection.
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input", "rotate"})
    inner_axes: ClassVar[str] = "heads*value_dim"
    plain: ClassVar[frozenset[str]] = frozenset({"heads", "value_dim"})
    kind: Literal["mla"] = "mla"
    heads: Count
    head_dim: Count
    shared_dim: Count
    value_dim: Count | None = None
    rank: Count
    query_rank: Count | None = None
    norm: LatentNorm | None = LatentNorm()
    window: Count | None = None
    scale: Positive | None = None
    bias: Flag = False
    out_bias: Flag = False
    project: Flag = True

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Both latents, values wider than keys, a window. No biases: unrotated, that of the shared key moves all scores
        of a query alike, which no softmax sees."""
        yield cls(heads=3, head_dim=4, shared_dim=2, value_dim=width // 2, rank=5, query_rank=7, window=5)

    @property
    def inner(self) -> int:
        """The width of all heads side by side."""
        return self.heads * (self.value_dim or self.head_dim)

    @property
    def score_scale(self) -> float:
        """What scores are times."""
        return self.scale or (self.head_dim + self.shared_dim) ** -0.5

    @property
    def group(self) -> Group:
        """All heads, which see the same keys; the cache holds what they are made of, once."""
        return Group("memory", self.heads, 1, self.window)

    def channels(self) -> Iterator[int]:
        """What is shared rotates, and the queries for it."""
        yield self.shared_dim

    def build(self, scope: Scope) -> "MlaModule":
        return MlaModule(self, scope)

    def flops(self, scope: Scope, length: int) -> float:
        """The maps, and scores and values over the mean number of visible keys."""
        width, queries = scope.width, self.heads * (self.head_dim + self.shared_dim)
        maps = width * (self.rank + self.shared_dim + self.inner * self.project)
        maps += self.rank * (self.heads * self.head_dim + self.inner)
        maps += width * queries if self.query_rank is None else self.query_rank * (width + queries)
        return 2.0 * maps + 2.0 * mean_visible(self.group.reach(scope.prefix), length) * (queries + self.inner)

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """The latents and the shared keys of the tokens that can still be seen."""
        return self.group.slots(length, scope.prefix) * (self.rank + self.shared_dim) * dtype.itemsize

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """The latents' channels, and each head's."""
        asked = "query_rank" if self.query_rank else "width"
        axes: dict[str, tuple[str, ...]] = {
            "latent.weight": ("rank", "width"),
            "shared.weight": ("shared_dim", "width"),
            "q.weight": ("heads*head_dim", asked),
            "q_shared.weight": ("heads*shared_dim", asked),
            "k.weight": ("heads*head_dim", "rank"),
            "v.weight": ("heads*value_dim", "rank"),
        }
        latents = {"latent": "rank", "q_latent": "query_rank"} if self.query_rank else {"latent": "rank"}
        axes |= {"q_latent.weight": ("query_rank", "width")} if self.query_rank else {}
        if self.norm and self.norm.gain != "none":
            axes |= {f"{name}_norm.weight": (rank,) for name, rank in latents.items()}
        if self.bias:
            axes |= {f"{name}.bias": (rank,) for name, rank in (latents | {"shared": "shared_dim"}).items()}
        return axes | self.output_axes()

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        own = {name: getattr(self, name) for name in ("heads", "head_dim", "shared_dim", "rank")}
        others = {"value_dim": self.value_dim or self.head_dim, "query_rank": self.query_rank or 1}
        return {"width": scope.width, **own, **others}

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """Norms stand over the latents; scores are scaled by what the channels of a key were."""
        fields: dict[str, Any] = {axis: len(keep)}
        if axis in ("head_dim", "shared_dim"):
            if axis == "shared_dim":
                self.refuse_with("rotate", axis, scope)
            return fields | {"scale": self.score_scale, "value_dim": self.value_dim or self.head_dim}
        if axis == "rank":
            return fields | {"norm": self.norm and self.norm.narrowed(self.rank, keep)}
        if axis == "query_rank":
            assert self.query_rank is not None
            count = self.norm and self.norm.of_queries.narrowed(self.query_rank, keep).count
            return fields | {"norm": self.norm and self.norm.model_copy(update={"query_count": count})}
        return super().narrowed_fields(axis, keep, scope)


class HeadMap(Module):
    """A map from the latent to each head. None of torch's, which tools wrap (LoRA, quantisation): a step uses the
    weight by itself."""

    def __init__(self, rank: int, heads: int, channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = self.declare("weight", (heads * channels, rank), fan_in(), decay=True)

    def forward(self, latent: Float[Tensor, "batch time rank"]) -> Heads:
        """What each head makes of the latent."""
        return products.linear(latent, self.weight).unflatten(2, (self.heads, -1))

    def by_head(self) -> Float[Tensor, "heads channels rank"]:
        """The weight; where a tool brings it for calls alone (offloading), what a call makes of each unit vector."""
        if "forward" not in vars(self):
            return self.weight.unflatten(0, (self.heads, -1))
        each = torch.eye(self.weight.shape[1], dtype=self.weight.dtype)
        return rearrange(self.forward(each[None]), "1 r h d -> h d r")


class MlaModule(ProjectedModule):
    """The module of `Mla`."""

    def __init__(self, spec: Mla, scope: Scope) -> None:
        super().__init__()
        self.spec, self.prefix, width = spec, scope.prefix, scope.width
        asked = spec.query_rank or width
        self.q_latent = LinearModule(width, spec.query_rank, bias=spec.bias) if spec.query_rank else None
        self.q_latent_norm = (
            NormModule(spec.norm.of_queries, spec.query_rank) if spec.query_rank and spec.norm else None
        )
        self.q = LinearModule(asked, spec.heads * spec.head_dim)
        self.q_shared = LinearModule(asked, spec.heads * spec.shared_dim)
        self.latent = LinearModule(width, spec.rank, bias=spec.bias)
        self.latent_norm = NormModule(spec.norm, spec.rank) if spec.norm else None
        self.shared = LinearModule(width, spec.shared_dim, bias=spec.bias)
        self.k = HeadMap(spec.rank, spec.heads, spec.head_dim)
        self.v = HeadMap(spec.rank, spec.heads, spec.value_dim or spec.head_dim)
        self.add_output_map(spec, width)
        self.scale = spec.score_scale

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        x = context.encode(self.spec.encodings, x)
        q, memory = self._queries(x, context), self._memory(x, context)
        y = self._attend(q, memory, context).flatten(2)
        return self.projected(y)

    def _queries(self, x: Stream, context: Context) -> Heads:
        """Each head's own channels, then those for the shared keys."""
        if self.q_latent is not None:
            x = self.q_latent(x)
            x = x if self.q_latent_norm is None else self.q_latent_norm(x)
        own, shared = (q(x).unflatten(2, (self.spec.heads, -1)) for q in (self.q, self.q_shared))
        return torch.cat([own, context.rotate(self.spec.encodings, shared)], -1)

    def _memory(self, x: Stream, context: Context) -> Memory:
        latent = self.latent(x)
        latent = latent if self.latent_norm is None else self.latent_norm(latent)
        shared = context.rotate(self.spec.encodings, self.shared(x)[:, :, None]).squeeze(2)
        return torch.cat([latent, shared], -1)

    def _attend(self, q: Heads, memory: Memory, context: Context) -> Heads:
        spec, state, past = self.spec, self.state(context), None
        if state is not None:
            (ring,) = kv_cache.rings(context, state, ["memory"], window=spec.window)
            if context.is_step(q):
                return self._step(ring, q[:, 0], memory, context)[:, None]
            past = self._recall(ring, memory, context)
        k, v = self._expanded(memory)
        visible = {"window": spec.window, "segments": context.segments, "past": past, "prefix": self.prefix}
        return attention(q, k, v, scale=self.scale, **visible)

    def _expanded(self, memory: Memory) -> tuple[Heads, Heads]:
        """Keys and values of every head."""
        latent, shared = memory.split([self.spec.rank, self.spec.shared_dim], -1)
        shared = shared[:, :, None].expand(-1, -1, self.spec.heads, -1)
        return torch.cat([self.k(latent), shared], -1), self.v(latent)

    def _step(self, ring: Tensor, q: Tensor, memory: Tensor, context: Context) -> Float[Tensor, "batch heads channels"]:
        """One token a row: the ring is the keys of one head that all queries read, its latents are the values."""
        spec = self.spec
        kv_cache.write_token(context, ring, memory[:, :, None])
        own, shared = q.split([spec.head_dim, spec.shared_dim], -1)
        asked = torch.cat([_by_head(own, self.k.by_head()), shared], -1)
        filled, latents = context.once(kv_cache.filled, ring.shape[2], ring.dtype), ring.narrow(-1, 0, spec.rank)
        return _by_head(attention_step(asked, ring, latents, filled, scale=self.scale), self.v.by_head().mT)

    def _recall(self, ring: Tensor, memory: Memory, context: Context) -> Past | None:
        """Keys and values of what the cache holds before a chunk, None where that is nothing; the chunk is written
        into it."""
        before = kv_cache.past(context, ring)
        past = None if before is None else Past(*self._expanded(before.squeeze(2)), kv_cache.ages(context, ring))
        kv_cache.write_chunk(context, ring, memory[:, :, None])
        return past

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """A ring of latents and shared keys."""
        spec = self.spec
        slots = spec.group.slots(capacity, self.prefix)
        return {"memory": like.new_zeros(batch, 1, slots, spec.rank + spec.shared_dim)}


def _by_head(x: Float[Tensor, "batch heads inputs"], maps: Float[Tensor, "heads inputs outputs"]) -> Tensor:
    """Each head through a map of its own: [batch, heads, outputs]."""
    return (x.transpose(0, 1) @ maps).transpose(0, 1)
