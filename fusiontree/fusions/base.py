"""What every fusion does, in this order: each branch on the normed input, `branch_norm`, `exchange`, `align`, the
gate, the rule, then projection(fused) + mlp(aligned). All but the branches and the rule are optional."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from fusiontree.components import (
    AnyNode,
    Context,
    Fusion,
    FusionSpec,
    GateScope,
    LinearModule,
    NamedMap,
    Narrowing,
    NodeSpec,
    Norm,
    NormModule,
    Problems,
    Scope,
    SpecError,
    Weights,
    branch_path,
    branches,
    invalid,
    suggest,
)
from fusiontree.fusions.parts import Align, AlignSpec, Exchange, ExchangeSpec, Features, ProjectionSpec

_AXIS = re.compile(r"\w+")
Stream = Float[Tensor, "batch time width"]
Fused = Float[Tensor, "batch time fused"]


class BaseFusionSpec(FusionSpec):
    """The fields of every fusion. `mlp` is a branch that reads the aligned features (else the normed input)."""

    branch_norm: Norm | None = None
    exchange: ExchangeSpec | None = None
    align: AlignSpec | None = None
    projection: ProjectionSpec | None = None
    mlp: AnyNode | None = None

    equal_widths: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_readers(self) -> Self:
        if not self.branches:
            raise invalid({("branches",): "a fusion needs at least one branch, found none"})
        if self.exchange and len(self.branches) == 1:
            raise invalid({("exchange",): "messages need two branches, found one"})
        if self.align and not self.mlp and not (self.gate_spec and self.gate_spec.reads_features):
            raise invalid({("align",): "nothing reads the aligned features: neither an mlp nor a gate that reads"})
        return self

    def children(self) -> Iterator[tuple[str, NodeSpec]]:
        yield from ((branch_path("", name), node) for name, node in self.branches.items())
        if self.mlp:
            yield "mlp", self.mlp

    def widths(self, scope: Scope) -> dict[str, int]:
        """What each branch returns."""
        return {name: node.output_width(scope) for name, node in self.branches.items()}

    def fused_width(self, scope: Scope) -> int:
        """What the rule returns (for rules that need equal widths: any branch's)."""
        return next(iter(self.widths(scope).values()))

    def gate_scope(self, scope: Scope) -> GateScope:
        return GateScope(tuple(self.branches), scope.width, self.fused_width(scope))

    def problems(self, scope: Scope) -> Problems:
        """Widths that do not meet, inner features without a projection, a gate that does not fit."""
        widths = self.widths(scope)
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        if self.equal_widths and len(set(widths.values())) > 1:
            yield "branches", f"the branches' widths must agree, found {listed}"
        elif not self.projection and set(widths.values()) != {scope.width}:
            yield "projection", f"inner features ({listed}) need a projection to the width {scope.width}"
        if self.gate_spec:
            yield from ((f"gate.{where}", text) for where, text in self.gate_spec.problems(self.gate_scope(scope)))
        if self.mlp and self.mlp.output_width(scope) != scope.width:
            yield "mlp", f"expected the width {scope.width} of what it returns, found {self.mlp.output_width(scope)}"

    def flops(self, scope: Scope, length: int) -> float:
        widths = self.widths(scope)
        parts = self.exchange.flops(widths) if self.exchange else 0.0
        parts += self.align.flops(widths, scope.width) if self.align else 0.0
        parts += self.gate_spec.flops(self.gate_scope(scope)) if self.gate_spec else 0.0
        return parts + (2.0 * self.projection_inputs(scope) * scope.width if self.projection else 0.0)

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """The axes of every part that has parameters; `<branch>.width` is what a branch returns."""
        names = list(self.branches)
        axes: dict[str, tuple[str, ...]] = {}
        if self.branch_norm and self.branch_norm.gain != "none":
            axes |= {f"branch_norm.{name}.weight": (f"{name}.width",) for name in names}
        if self.exchange:
            axes |= {f"exchange.down.{name}.weight": ("exchange_rank", f"{name}.width") for name in names}
            axes |= {f"exchange.up.{name}.weight": (f"{name}.width", "exchange_rank") for name in names}
        if self.align:
            axes |= {f"align.inputs.{name}.weight": ("align_hidden", f"{name}.width") for name in names}
            axes |= {"align.bias": ("align_hidden",), "align.out.weight": ("width", "align_hidden")}
        return axes | self._gate_axes() | self.projection_axes()

    def _gate_axes(self) -> dict[str, tuple[str, ...]]:
        gate = self.gate_spec
        own = gate.axes(tuple(self.branches)) if gate else {}
        return {f"gate.{name}": tuple(_AXIS.sub(r"gate_\g<0>", d) for d in dims) for name, dims in own.items()}

    def projection_axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of the projection."""
        bias = {"projection.bias": ("width",)} if self.projection and self.projection.bias else {}
        return bias | ({"projection.weight": ("width", "fused_width")} if self.projection else {})

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        sizes = {"width": scope.width, "fused_width": self.fused_width(scope)}
        sizes |= {f"{name}.width": width for name, width in self.widths(scope).items()}
        sizes |= {"exchange_rank": self.exchange.rank} if self.exchange else {}
        sizes |= {"align_hidden": self.align.hidden} if self.align else {}
        return sizes | self._gate_sizes(scope)

    def _gate_sizes(self, scope: Scope) -> dict[str, int]:
        gate = self.gate_spec
        return {f"gate_{axis}": size for axis, size in gate.sizes(self.gate_scope(scope)).items()} if gate else {}

    def narrowed(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Narrowing[Self]:
        """Parts of the fusion have axes of their own. The branches' features leave together (`fused_width`, or groups
        of them, `gate_units`), and one branch's by itself where the rule takes unequal widths."""
        if axis == "exchange_rank":
            return self.with_fields({"exchange": {"rank": len(keep)}}, axis, keep)
        if axis == "align_hidden":
            return self.with_fields({"align": {"hidden": len(keep)}}, axis, keep)
        if axis in self._gate_sizes(scope) and axis != "gate_units":
            assert self.gate_spec is not None
            gate = self.gate_spec.narrow(axis.removeprefix("gate_"), keep, self.gate_scope(scope))
            return self.with_fields({"gate": gate}, axis, keep)
        if axis == "gate_units":
            size = self.fused_width(scope) // self.sizes(scope)[axis]
            keep, axis = tuple(size * unit + i for unit in keep for i in range(size)), "fused_width"
        names = list(self.branches) if axis == "fused_width" and self.equal_widths else [axis.removesuffix(".width")]
        if not set(names) <= set(self.branches) or (len(names) < len(self.branches) and self.equal_widths):
            hint = f"; narrow {'fused_width' if axis.endswith('.width') else 'BRANCH.width'}" if self.projection else ""
            raise SpecError(f"{axis}: cannot be narrowed here, other nodes' parameters run over it{hint}")
        return self._without_features(names, keep, scope)

    def _without_features(self, names: Sequence[str], keep: tuple[int, ...], scope: Scope) -> Narrowing[Self]:
        """The fusion whose named branches return these of their features alone."""
        if self.projection is None:
            raise SpecError("fused_width: without a projection it is the stream's width")
        branches = {name: self.branches[name].narrow_output(keep, self._scope_of(name, scope)) for name in names}
        nodes = {**self.branches, **{name: found.spec for name, found in branches.items()}}
        fields: dict[str, Any] = {"branches": nodes}
        own = {f"{name}.width": keep for name in names}
        if self.branch_norm:
            fields["branch_norm"] = self._narrowed_branch_norm(keep, scope)
        if self.equal_widths:
            own["fused_width"] = keep
        if self.gate_spec:
            gate, units = self.gate_spec.narrow_width(keep, self.gate_scope(scope))
            fields["gate"], own["gate_units"] = gate, units
        narrower = Narrowing(type(self).parse(self.data() | fields), {"": own})
        return narrower.with_inside({branch_path("", name): found for name, found in branches.items()})

    def _scope_of(self, name: str, scope: Scope) -> Scope:
        return self.child_scope(branch_path("", name), scope)

    def _narrowed_branch_norm(self, keep: tuple[int, ...], scope: Scope) -> Norm:
        assert self.branch_norm is not None
        if not self.equal_widths:
            raise SpecError("branch_norm: one count cannot be that of branches of unequal widths")
        return self.branch_norm.narrowed(self.fused_width(scope), keep)

    def projection_inputs(self, scope: Scope) -> int:
        """How many features the projection reads."""
        return self.fused_width(scope)

    def without_branch(self, branch: str) -> Self:
        """The fusion less one branch, and less all that only the branch made useful."""
        if branch not in self.branches:
            raise SpecError(f"no branch is called {branch!r}{suggest(branch, self.branches)}")
        left = {name: node for name, node in self.branches.items() if name != branch}
        if not left:
            raise SpecError(f"{branch!r} is the last branch; drop the fusion itself")
        data: dict[str, Any] = self.data() | {"branches": {name: node.data() for name, node in left.items()}}
        data |= self.rule_without(branch, len(left))
        if len(left) == 1:
            data["exchange"] = None
        gate = data.get("gate")
        reads = gate is not None and self.gate_spec is not None and self.gate_spec.reads_features
        if not (self.mlp or reads):
            data["align"] = None
        return type(self).parse(data)

    def passthrough_branch(self) -> str | None:
        """The branch, if it is the only one and there is no part and no rule that changes it."""
        parts = (self.branch_norm, self.exchange, self.align, self.projection, self.mlp)
        alone = len(self.branches) == 1 and not any(parts) and self.is_identity(next(iter(self.branches)))
        return next(iter(self.branches)) if alone else None

    def is_identity(self, branch: str) -> bool:
        """Whether the rule leaves a single branch as it is."""
        return True

    def rule_without(self, branch: str, left: int) -> dict[str, Any]:
        """The fields of the rule that change as a branch leaves."""
        return {}

    @abstractmethod
    def build(self, scope: Scope) -> "BaseFusion":
        """The module."""


def example_branches(width: int) -> NamedMap[NodeSpec]:
    """Two branches of different kinds, for examples that hold any."""
    return NamedMap({kind: next(branches.get(kind).examples(width)) for kind in ("attention", "mamba2")})


class BaseFusion(Fusion):
    """The module of a fusion; a rule is a subclass with `fuse`."""

    def __init__(self, spec: BaseFusionSpec, scope: Scope) -> None:
        super().__init__()
        self.spec = spec
        widths, gate = spec.widths(scope), spec.gate_spec
        self.branches = nn.ModuleDict({name: node.build(scope) for name, node in spec.branches.items()})
        norm = spec.branch_norm
        self.branch_norm = nn.ModuleDict({name: NormModule(norm, w) for name, w in widths.items()} if norm else {})
        self.exchange = Exchange(spec.exchange, widths) if spec.exchange else None
        self.align = Align(spec.align, widths, scope.width) if spec.align else None
        self.gate = gate.build(spec.gate_scope(scope)) if gate else None
        self.projection = self.build_projection(spec, scope) if spec.projection else None
        self.mlp = spec.mlp.build(scope) if spec.mlp else None

    def build_projection(self, spec: BaseFusionSpec, scope: Scope) -> nn.Module:
        """The way back to the stream."""
        assert spec.projection is not None
        return LinearModule(spec.fused_width(scope), scope.width, bias=spec.projection.bias)

    def fuse(self, features: Features, weights: Weights) -> Fused:
        """The rule."""
        raise NotImplementedError

    def combine(self, features: Features, weights: Weights) -> Stream:
        """The rule, and the way back to the stream where there is a projection."""
        fused = self.fuse(features, weights)
        return fused if self.projection is None else self.projection(fused)

    def forward(self, x: Stream, context: Context) -> Stream:
        features = {name: branch(x, context) for name, branch in self.branches.items()}
        if self.branch_norm:
            features = {name: self.branch_norm[name](h) for name, h in features.items()}
        if self.exchange is not None:
            features = self._silent(self.exchange(features))
        common = x if self.align is None else self.align(features)
        weights = {} if self.gate is None else self.gate(common, context)
        out = self.combine(features, weights)
        return out if self.mlp is None else out + self.mlp(common, context)

    def _silent(self, features: Features) -> Features:
        """No message wakes a dropped branch."""
        return {n: torch.zeros_like(h) if n in self.dropped else h for n, h in features.items()}
