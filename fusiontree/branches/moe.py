"""A feed-forward network of experts, of which every token visits a few (Shazeer et al., arXiv 1701.06538).

No token is dropped and none waits for a place: tokens are sorted by expert, and each expert that has some makes its
products with all of them. What a token gets depends on nothing but the token.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from fusiontree.branches.experts import Choice, Experts, Shares, Tokens, hidden
from fusiontree.components import (
    BranchSpec,
    Context,
    Count,
    Flag,
    LinearModule,
    Module,
    Node,
    Positive,
    Scope,
    Spec,
    SpecError,
    accumulation_dtype,
    branches,
    constant,
    invalid,
    scaled,
)

Stream = Float[Tensor, "batch time width"]
Scores = Float[Tensor, "tokens experts"]


class Router(Spec):
    """How the router's scores of a token become the shares of its chosen experts.

    Attributes:
        scores: softmax over all experts, or the sigmoid of each (DeepSeek-V3, arXiv 2412.19437).
        renormalise: shares sum to 1. Of a softmax this is the softmax over the chosen alone.
        multiplier: a constant times the shares.
        correction: what is added to the scores for the choice alone, to balance loads; no gradient reaches it
            (arXiv 2408.15664).
        groups: equal groups of experts, of which a token visits only the `top_groups` whose two highest experts have
            the highest sum (DeepSeek-V3).
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: Flag = True
    multiplier: Positive = 1.0
    correction: Flag = False
    groups: Count = 1
    top_groups: Count = 1

    @model_validator(mode="after")
    def _enough_groups(self) -> Self:
        if self.top_groups > self.groups:
            raise invalid({("top_groups",): f"found {self.top_groups}, groups is {self.groups}"})
        return self

    @property
    def limited(self) -> bool:
        """Whether some groups are left out."""
        return self.top_groups < self.groups


@branches.register
class Moe(BranchSpec):
    """A mixture of experts: every token visits `top_k` of `experts` feed-forward networks.

    Attributes:
        hidden: features of each expert.
        activation: `swiglu` has a gate, W_down (silu(W_gate x) * W_up x); `relu2` has none.
        router: see there.
        shared_hidden: features of one more network, which every token visits (DeepSeekMoE, arXiv 2401.06066).
        shared_gate: that network's output is times sigmoid(w x) (Qwen-MoE).
    """

    plain: ClassVar[frozenset[str]] = frozenset({"hidden", "shared_hidden"})
    routed: ClassVar[frozenset[str]] = frozenset({"groups", "group_experts"})
    kind: Literal["moe"] = "moe"
    experts: Count
    top_k: Count
    hidden: Count
    activation: Literal["swiglu", "relu2"] = "swiglu"
    router: Router = Router()
    shared_hidden: Count | None = None
    shared_gate: Flag = False

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.experts % self.router.groups:
            text = f"{self.router.groups} groups do not divide {self.experts} experts"
            raise invalid({("router", "groups"): text})
        reached = self.group_experts * self.router.top_groups
        if self.top_k > reached:
            where = f"in {self.router.top_groups} of {self.router.groups} groups" if self.router.limited else "there"
            raise invalid({("top_k",): f"found {self.top_k}, {where} are {reached} experts"})
        if self.shared_gate and self.shared_hidden is None:
            raise invalid({("shared_gate",): "shared_hidden is null: there is no shared network"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Six experts of which two are visited, in two of three groups, and a gated shared network."""
        router = Router(scores="sigmoid", multiplier=1.5, correction=True, groups=3, top_groups=2)
        yield cls(experts=6, top_k=2, hidden=6, router=router, shared_hidden=10, shared_gate=True)
        yield cls(experts=3, top_k=2, hidden=4, activation="relu2")

    @property
    def group_experts(self) -> int:
        """Experts in a group."""
        return self.experts // self.router.groups

    @property
    def gated(self) -> bool:
        """Whether a second map gates the first."""
        return self.activation == "swiglu"

    @property
    def maps(self) -> tuple[str, ...]:
        """The maps into the hidden features."""
        return ("gate", "up") if self.gated else ("up",)

    def build(self, scope: Scope) -> "MoeModule":
        return MoeModule(self, scope.width)

    def flops(self, scope: Scope, length: int) -> float:
        """The router, the visited experts, and the shared network."""
        hidden = self.top_k * self.hidden + (self.shared_hidden or 0)
        return 2.0 * scope.width * (self.experts + (len(self.maps) + 1) * hidden + self.shared_gate)

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Experts are the outermost dimension of their maps."""
        experts = "groups*group_experts"
        axes: dict[str, tuple[str, ...]] = {"router.weight": (experts, "width")}
        axes |= {"correction": (experts,)} if self.router.correction else {}
        axes |= {f"experts.{name}": (experts, "hidden", "width") for name in self.maps}
        axes["experts.down"] = (experts, "width", "hidden")
        if self.shared_hidden:
            axes |= {f"shared.{name}.weight": ("shared_hidden", "width") for name in self.maps}
            axes["shared.down.weight"] = ("width", "shared_hidden")
        return axes | ({"shared_gate.weight": ("one", "width")} if self.shared_gate else {})

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        sizes = {"width": scope.width, "hidden": self.hidden, "one": 1}
        sizes |= {"groups": self.router.groups, "group_experts": self.group_experts}
        return sizes | ({"shared_hidden": self.shared_hidden} if self.shared_hidden else {})

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """Experts that are never chosen may go, with their rows of the router."""
        router, left = self.router, len(keep)
        if axis == "groups":
            return {"experts": left * self.group_experts, "router": router.model_copy(update={"groups": left})}
        if axis == "group_experts":
            if router.limited and left == 1:
                raise SpecError("group_experts: a group is chosen by its two best experts, of which two have to stay")
            return {"experts": left * router.groups}
        return super().narrowed_fields(axis, keep, scope)


class MoeModule(Node):
    """The module of `Moe`."""

    def __init__(self, spec: Moe, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.router = LinearModule(width, spec.experts)
        added, start = (spec.experts,), constant(0.0)
        self.correction = self.declare_unlearned("correction", added, start) if spec.router.correction else None
        self.experts = Experts((spec.experts, spec.hidden, width), gated=spec.gated)
        self.shared = Shared(spec.shared_hidden, width, gated=spec.gated) if spec.shared_hidden else None
        self.shared_gate = LinearModule(width, 1) if spec.shared_gate else None

    def forward(self, x: Stream, context: Context) -> Stream:
        x = context.encode(self.spec.encodings, x)
        tokens = x.flatten(0, 1)
        y = self.experts(tokens, *self.choose(tokens))
        if self.shared is not None:
            shared = self.shared(tokens)
            y = y + (shared if self.shared_gate is None else shared * self.shared_gate(tokens).sigmoid())
        return y.view_as(x)

    def choose(self, tokens: Tokens) -> tuple[Shares, Choice]:
        """The experts that tokens visit and their shares, worked out in float32 or better."""
        router, logits = self.spec.router, self.router(tokens).to(accumulation_dtype(tokens.dtype))
        scores = logits.softmax(-1) if router.scores == "softmax" else logits.sigmoid()
        choice = self._ranks(logits, scores).topk(self.spec.top_k).indices
        if router.renormalise and router.scores == "softmax":
            shares = logits.gather(-1, choice).softmax(-1)
        else:
            shares = scores.gather(-1, choice)
            shares = shares / shares.sum(-1, keepdim=True) if router.renormalise else shares
        return scaled(shares, router.multiplier).to(tokens.dtype), choice

    def _ranks(self, logits: Scores, scores: Scores) -> Scores:
        """What experts are chosen by."""
        if self.correction is not None:
            scores = scores + self.correction.to(scores.dtype)
        elif not self.spec.router.limited:
            return logits  # which have the order of the scores, and no ties where those are rounded to 0 or 1
        return _in_best_groups(scores, self.spec.router) if self.spec.router.limited else scores


def _in_best_groups(ranks: Scores, router: Router) -> Scores:
    """-inf for the experts of all but the best groups."""
    grouped = ranks.unflatten(-1, (router.groups, -1))
    best = grouped.topk(min(2, grouped.shape[-1])).values.sum(-1).topk(router.top_groups).indices
    left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)


class Shared(Module):
    """The network that every token visits."""

    def __init__(self, inner: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.gate = LinearModule(width, inner) if gated else None
        self.up, self.down = LinearModule(width, inner), LinearModule(inner, width)

    def forward(self, x: Tokens) -> Tokens:
        """Each token on its own."""
        return self.down(hidden(None if self.gate is None else self.gate(x), self.up(x)))
