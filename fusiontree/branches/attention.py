"""Causal softmax attention with grouped queries (arXiv 2305.13245): windowed heads, global heads, or both in one
branch, each with key-value heads of their own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from fusiontree.branches import kv_cache
from fusiontree.branches.kv_cache import Ring
from fusiontree.branches.projected import ProjectedModule, ProjectedSpec
from fusiontree.components import (
    Context,
    Count,
    Flag,
    Hook,
    LinearModule,
    Natural,
    Node,
    NodeSpec,
    Norm,
    NormModule,
    Positive,
    Real,
    Scope,
    Spec,
    State,
    branches,
    invalid,
    scaled,
)
from fusiontree.kernels.attention import AlibiBias, Past, attention, attention_step

Stream = Float[Tensor, "batch time width"]
Channels = Float[Tensor, "batch time heads*channels"]
Heads = Float[Tensor, "batch time heads channels"]


KEY_AXES = "windowed_kv_heads*head_dim+global_kv_heads*head_dim"
QUERY_AXES = "windowed_kv_heads*windowed_queries*head_dim+global_kv_heads*global_queries*head_dim"
"""The queries of a key-value head are adjacent, windowed heads before global ones."""


@dataclass(frozen=True)
class Group:
    """Heads that see the same keys: all of the branch's windowed heads, or all of its global ones."""

    name: str
    heads: int
    kv_heads: int
    window: int | None

    def reach(self, prefix: int) -> int | None:
        """How many tokens a query sees at most (None: all): those in the window, and the prefix wherever it is."""
        return None if self.window is None else self.window + prefix

    def slots(self, capacity: int | None, prefix: int) -> int:
        """How many tokens the cache of a row holds (0: as many as come)."""
        reach = self.reach(prefix)
        if reach is None:
            return capacity or 0
        return reach if capacity is None else min(reach, capacity)


class Keys(NamedTuple):
    """Keys and values that the queries of a group read: the chunk's, and those cached before it. In a decode step
    `rings` hold the new token's, too, and are all that is read."""

    k: Heads
    v: Heads
    past: Past | None = None
    rings: tuple[Ring, Ring] | None = None


class AttentionMultipliers(Spec):
    """Constants times the branch's input and times the keys (muP; Falcon-H1, arXiv 2507.22448)."""

    input: Real = 1.0
    key: Real = 1.0


class QKNorm(Norm):
    """A norm of queries and one of keys: each head by itself, or all heads as one (OLMo 2, arXiv 2501.00656); then
    `key_count` is the `count` of that of the keys."""

    over: Literal["head", "all"] = "head"
    key_count: Count | None = None

    @property
    def of_keys(self) -> Self:
        """That of the keys."""
        return self if self.over == "head" else self.model_copy(update={"count": self.key_count})


@branches.register
class Attention(ProjectedSpec):
    """Softmax attention with grouped queries, windowed heads and global ones.

    `heads` and `kv_heads` are totals, the global ones included; `window` counts visible keys, itself included
    (null: all). Scores are softcap * tanh(scale * q k / softcap); `scale` is head_dim ** -0.5 unless given.
    `qk_norm` normalises queries and keys before they rotate. `gate` multiplies the heads by sigmoid(gate(x))
    (Qwen3-Next; arXiv 2505.06708). `bias` is that of q, k, v and the gate. `project: false` returns the heads side by
    side, for a fusion with a projection. `keys_from` is the path of attention in an earlier layer whose keys and values
    are used, so that this one has none (Hymba, arXiv 2411.13676).
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset({"input", "rotate", "bias"})
    kv_source_field: ClassVar[str | None] = "keys_from"
    inner_axes: ClassVar[str] = QUERY_AXES.replace("head_dim", "value_dim")
    kind: Literal["attention"] = "attention"
    heads: Count
    kv_heads: Count
    head_dim: Count
    value_dim: Count | None = None
    window: Count | None = None
    global_heads: Natural = 0
    global_kv_heads: Natural = 0
    qk_norm: QKNorm | None = None
    softcap: Positive | None = None
    scale: Positive | None = None
    gate: Flag = False
    bias: Flag = False
    out_bias: Flag = False
    project: Flag = True
    multipliers: AttentionMultipliers = AttentionMultipliers()
    keys_from: Annotated[str, Field(strict=True)] | None = None

    @model_validator(mode="after")
    def _keys_are_its_own(self) -> Self:
        if self.keys_from is not None and self.multipliers.key != 1.0:
            raise invalid({("multipliers", "key"): f"its keys are those of {self.keys_from}"})
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.global_heads and self.window is None:
            raise invalid({("global_heads",): f"without a window all heads are global, found {self.global_heads}"})
        for name, part, whole in [
            ("global_heads", self.global_heads, self.heads),
            ("global_kv_heads", self.global_kv_heads, self.kv_heads),
        ]:
            if part > whole:
                raise invalid({(name,): f"found {part}, there are {whole} in all"})
        for name, heads, kv_heads in self._counts():
            if (heads > 0) != (kv_heads > 0) or (kv_heads and heads % kv_heads):
                text = f"{heads} {name} heads are not a multiple of {kv_heads} {name} key-value heads"
                raise invalid({("global_kv_heads" if name == "global" else "kv_heads",): text})
        return self

    def _counts(self) -> list[tuple[str, int, int]]:
        windowed = (self.heads - self.global_heads, self.kv_heads - self.global_kv_heads)
        return [("windowed", *windowed), ("global", self.global_heads, self.global_kv_heads)]

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Windowed and global heads with grouped queries, gated; and without a window."""
        yield cls(
            heads=6,
            kv_heads=3,
            head_dim=4,
            value_dim=width // 4,
            window=5,
            global_heads=2,
            global_kv_heads=1,
            qk_norm=QKNorm(),
            gate=True,
        )
        yield cls(heads=4, kv_heads=2, head_dim=4, value_dim=3 * width // 8)

    def groups(self) -> list[Group]:
        """The groups that have heads, in the order of the parameters' rows."""
        windows = {"windowed": self.window, "global": None}
        return [Group(name, h, kv, windows[name]) for name, h, kv in self._counts() if h]

    @property
    def inner(self) -> int:
        """The width of all heads side by side."""
        return self.heads * self.values

    def sharing_problem(self, source: NodeSpec) -> str | None:
        """What differs of keys and values."""
        if not isinstance(source, Attention):
            return f"keys_from: {self.keys_from} is no attention, found {getattr(source, 'kind', None)}"
        if source.keys_from is not None:
            return f"keys_from: {self.keys_from} uses those of {source.keys_from}; name that"
        for name in ("kv_heads", "global_kv_heads", "head_dim", "values", "window"):
            own, theirs = getattr(self, name), getattr(source, name)
            if own != theirs:
                word = "value_dim" if name == "values" else name
                return f"{word}: expected {theirs}, as {self.keys_from} has, found {own}"
        if self.encodings != source.encodings:
            have, found = (", ".join(each.encodings) or "none" for each in (source, self))
            return f"encodings: keys stand in those of {self.keys_from}, {have}, found {found}"
        return None

    @property
    def values(self) -> int:
        """Channels of a head's values."""
        return self.value_dim or self.head_dim

    @property
    def score_scale(self) -> float:
        """What scores are times."""
        return self.scale or self.head_dim**-0.5

    def channels(self) -> Iterator[int]:
        """Queries and keys rotate."""
        yield self.head_dim

    def build(self, scope: Scope) -> "AttentionModule":
        return AttentionModule(self, scope)

    def flops(self, scope: Scope, length: int) -> float:
        """The maps, and scores and values over the mean number of visible keys."""
        keys = 0 if self.keys_from else self.kv_heads * (self.head_dim + self.values)
        seen = sum(group.heads * mean_visible(group.reach(scope.prefix), length) for group in self.groups())
        maps = self.heads * self.head_dim + keys + self.inner * (self.gate + self.project)
        return 2.0 * scope.width * maps + 2.0 * seen * (self.head_dim + self.values)

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        """Keys and values of the tokens that heads can still see."""
        if self.keys_from is not None:
            return 0
        slots = sum(group.slots(length, scope.prefix) * group.kv_heads for group in self.groups())
        return slots * (self.head_dim + self.values) * dtype.itemsize

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Query heads run within their key-value head."""
        rows = {path: row for name, parts in self._rows().items() for path, row in parts.items()}
        axes: dict[str, tuple[str, ...]] = {f"{name}.weight": (row, "width") for name, row in rows.items()}
        axes |= {f"{name}.bias": (row,) for name, row in rows.items()} if self.bias else {}
        axes |= self.output_axes()
        if self.qk_norm and self.qk_norm.gain != "none":
            over = {"q": QUERY_AXES} if self.keys_from else {"q": QUERY_AXES, "k": KEY_AXES}
            each = self.qk_norm.over == "head"
            axes |= {f"{name}_norm.weight": ("head_dim" if each else row,) for name, row in over.items()}
        return axes

    def _rows(self) -> dict[str, dict[str, str]]:
        """The axes of the rows of the input maps, by map, then by path: one path, or one each for windowed and global
        heads."""
        rows = {"q": QUERY_AXES}
        rows |= {} if self.keys_from else {"k": KEY_AXES, "v": KEY_AXES.replace("head_dim", "value_dim")}
        rows |= {"gate": self.inner_axes} if self.gate else {}
        groups = ("windowed", "global")
        if not self.global_heads:
            return {name: {name: row} for name, row in rows.items()}
        return {
            name: {f"{name}.{group}_heads": part for group, part in zip(groups, row.split("+"), strict=True)}
            for name, row in rows.items()
        }

    def packed(self) -> Mapping[str, Sequence[str]]:
        """Windowed and global heads had the rows of one map."""
        kinds = ("weight", "bias") if self.bias else ("weight",)
        rows = self._rows().items() if self.global_heads else ()
        return {f"{name}.{kind}": [f"{path}.{kind}" for path in parts] for name, parts in rows for kind in kinds}

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        sizes = {"width": scope.width, "head_dim": self.head_dim, "value_dim": self.values}
        for name, heads, kv_heads in self._counts():
            sizes |= {f"{name}_kv_heads": kv_heads, f"{name}_queries": heads // max(kv_heads, 1)}
        return sizes

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """Heads leave with their share of the norms; scores are scaled by what the channels of a key were."""
        if axis == "value_dim":
            return {axis: len(keep)}
        if axis in self.rigid:
            return super().narrowed_fields(axis, keep, scope)
        self.refuse_with("rotate" if axis == "head_dim" else "bias", axis, scope)
        fields: dict[str, Any] = {"qk_norm": self._narrowed_norm(axis, keep, scope)}
        if axis == "head_dim":
            return fields | {axis: len(keep), "value_dim": self.values, "scale": self.score_scale}
        left = {**self.sizes(scope), axis: len(keep)}
        kv_heads = {name: left[f"{name}_kv_heads"] for name in ("windowed", "global")}
        heads = {name: count * left[f"{name}_queries"] for name, count in kv_heads.items()}
        totals = {"heads": sum(heads.values()), "kv_heads": sum(kv_heads.values())}
        return fields | totals | {"global_heads": heads["global"], "global_kv_heads": kv_heads["global"]}

    def _narrowed_norm(self, axis: str, keep: tuple[int, ...], scope: Scope) -> QKNorm | None:
        norm = self.qk_norm
        if norm is None or (norm.over == "head" and axis != "head_dim"):
            return norm
        if norm.over == "head":
            return norm.narrowed(self.head_dim, keep)
        norm = norm.narrowed(self.heads * self.head_dim, self.kept_along(QUERY_AXES, axis, keep, scope))
        if axis.endswith("queries"):
            return norm
        count = norm.of_keys.narrowed(self.kv_heads * self.head_dim, self.kept_along(KEY_AXES, axis, keep, scope)).count
        return norm.model_copy(update={"key_count": count})


def mean_visible(window: int | None, length: int) -> float:
    """How many keys a query sees, the mean over the positions of `length` tokens.

    >>> mean_visible(2, 4)
    1.75
    """
    w = length if window is None else min(window, length)
    return w - w * (w - 1) / (2 * length)


def _norm(norm: QKNorm | None, spec: Attention, heads: int) -> NormModule | None:
    """Of one head, or of so many."""
    return NormModule(norm, spec.head_dim * (heads if norm.over == "all" else 1)) if norm else None


class HeadMaps(nn.ModuleDict):
    """The maps of windowed and of global heads, what they give side by side."""

    def forward(self, x: Stream) -> Channels:
        """Each map on the same input."""
        return torch.cat([each(x) for each in self.values()], -1)


def _maps(spec: Attention, width: int, rows: Mapping[str, int]) -> LinearModule | HeadMaps:
    """One map, or one for each kind of heads, of so many rows."""
    maps = {f"{name}_heads": LinearModule(width, count, bias=spec.bias) for name, count in rows.items()}
    return HeadMaps(maps) if len(maps) > 1 else next(iter(maps.values()))


class AttentionModule(ProjectedModule):
    """The module of `Attention`: separate maps q, k, v and out. Windowed heads come first; with both kinds of heads
    each has its own q, k and v."""

    def __init__(self, spec: Attention, scope: Scope) -> None:
        super().__init__()
        self.spec, self.prefix, width = spec, scope.prefix, scope.width
        self.q = _maps(spec, width, {group.name: group.heads * spec.head_dim for group in spec.groups()})
        self.q_norm = _norm(spec.qk_norm, spec, spec.heads)
        if spec.keys_from is None:
            self.k = _maps(spec, width, {group.name: group.kv_heads * spec.head_dim for group in spec.groups()})
            self.v = _maps(spec, width, {group.name: group.kv_heads * spec.values for group in spec.groups()})
            self.k_norm = _norm(spec.qk_norm and spec.qk_norm.of_keys, spec, spec.kv_heads)
        values = {group.name: group.heads * spec.values for group in spec.groups()}
        self.gate = _maps(spec, width, values) if spec.gate else None
        self.add_output_map(spec, width)
        self.scale = spec.score_scale
        self.groups = spec.groups()

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        spec, groups = self.spec, self.groups
        x = scaled(context.encode(spec.encodings, x), spec.multipliers.input)
        q = self._by_head(self.q(x), spec.heads, self.q_norm, context)
        keys = self._keys(x, context) if spec.keys_from is None else _received(self, context)
        parts = zip(groups, _split(q, [group.heads for group in groups]), keys, strict=True)
        heads = [self._attend(group, q, visible, context) for group, q, visible in parts]
        y = heads[0] if len(heads) == 1 else torch.cat(heads, 2)
        y = y if self.gate is None else y * torch.sigmoid(self.gate(x))
        return self.projected(y)

    def _by_head(self, x: Channels, heads: int, norm: NormModule | None, context: Context) -> Heads:
        """Queries or keys, normalised and rotated."""
        spec, together = self.spec, self.spec.qk_norm is not None and self.spec.qk_norm.over == "all"
        x = norm(x) if norm and together else x
        x = x.view(*x.shape[:2], heads, spec.head_dim)
        x = norm(x) if norm and not together else x
        return context.rotate(spec.encodings, x)

    def _keys(self, x: Stream, context: Context) -> list[Keys]:
        """What the queries of each group look at; the chunk is written into the cache."""
        spec, heads = self.spec, [group.kv_heads for group in self.groups]
        k = self._by_head(scaled(self.k(x), spec.multipliers.key), spec.kv_heads, self.k_norm, context)
        v = self.v(x).view(*x.shape[:2], spec.kv_heads, spec.values)
        parts = zip(self.groups, _split(k, heads), _split(v, heads), strict=True)
        keys = [self._remember(group, k, v, context) for group, k, v in parts]
        if self.is_kv_source:
            assert context.published is not None
            context.published.values[self.local_path] = keys
        return keys

    def _remember(self, group: Group, k: Heads, v: Heads, context: Context) -> Keys:
        state = self.state(context)
        if state is None:
            return Keys(k, v)
        names = f"{group.name}.keys", f"{group.name}.values"
        keys, values = kv_cache.rings(context, state, names, window=group.window)
        if context.is_step(k):
            kv_cache.write_token(context, keys, k)
            kv_cache.write_token(context, values, v)
            return Keys(k, v, rings=(keys, values))
        past_k, past_v = kv_cache.past(context, keys), kv_cache.past(context, values)
        past = None if past_k is None or past_v is None else Past(past_k, past_v, kv_cache.ages(context, keys))
        kv_cache.write_chunk(context, keys, k)
        kv_cache.write_chunk(context, values, v)
        return Keys(k, v, past=past)

    def _attend(self, group: Group, q: Heads, keys: Keys, context: Context) -> Channels:
        options, slopes = {"scale": self.scale, "softcap": self.spec.softcap}, self._slopes(group, context)
        if keys.rings is not None:
            slots = keys.rings[0].shape[2]
            alibi = None if slopes is None else AlibiBias(slopes, context.once(kv_cache.distances, slots))
            filled = context.once(kv_cache.filled, slots, keys.rings[0].dtype)
            y = attention_step(q.squeeze(1), *keys.rings, filled, alibi=alibi, **options)
            return y.flatten(1)[:, None]
        visible = {"window": group.window, "segments": context.segments, "past": keys.past, "prefix": self.prefix}
        return attention(q, keys.k, keys.v, slopes=slopes, **visible, **options).flatten(2)

    def _slopes(self, group: Group, context: Context) -> tuple[float, ...] | None:
        """Those of a group's heads; global ones come last."""
        slopes = context.slopes(self.spec.encodings, self.spec.heads)
        if slopes is None:
            return None
        return slopes[: group.heads] if group.name == "windowed" else slopes[-group.heads :]

    def new_state(self, batch: int, capacity: int | None, like: Tensor) -> State:
        """A ring of keys and one of values for each group; heads come before slots, so that a step reads a head's slots
        contiguously."""
        if self.spec.keys_from is not None:
            return {}
        return {
            f"{group.name}.{name}": like.new_zeros(batch, group.kv_heads, group.slots(capacity, self.prefix), channels)
            for group in self.spec.groups()
            for name, channels in (("keys", self.spec.head_dim), ("values", self.spec.values))
        }


def _received(node: Node, context: Context) -> list[Keys]:
    assert context.received is not None
    return context.received.values[node.local_path]


def _split(x: Heads, heads: list[int]) -> Sequence[Heads]:
    """The heads of each group."""
    return x.split(heads, 2) if len(heads) > 1 else [x]
