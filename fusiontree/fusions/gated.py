"""The gated fusion: a convex combination of the branches, unit by unit of the gate."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from einops import rearrange
from pydantic import model_validator
from torch import Tensor

from fusiontree.components import AnyGate, GateSpec, Scope, Weights, fusions, gates, invalid, total
from fusiontree.fusions.base import BaseFusion, BaseFusionSpec, Fused, example_branches
from fusiontree.fusions.parts import Features


@fusions.register
class Gated(BaseFusionSpec):
    """A convex combination of the branches, weighed by a gate.

    sum_i g_i h_i with sum_i g_i = 1. A single branch has no gate and passes as it is.
    """

    kind: Literal["gated"] = "gated"
    gate: AnyGate | None = None

    @model_validator(mode="after")
    def _gate_for_several(self) -> Self:
        if self.gate and len(self.branches) == 1:
            raise invalid({("gate",): "a single branch has nothing to be weighed against; leave the gate out"})
        if not self.gate and len(self.branches) > 1:
            known = ", ".join(gates.names())
            raise invalid({("gate",): f"{len(self.branches)} branches need a gate (known: {known})"})
        return self

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """Two branches, every part."""
        yield cls.model_validate(
            {
                "branches": example_branches(width),
                "branch_norm": {"gain": "none"},
                "exchange": {"rank": 4},
                "align": {"hidden": width},
                "gate": {"kind": "sigmoid", "granularity": "channel", "rank": 4},
                "projection": {},
                "mlp": {"kind": "swiglu", "hidden": width},
            }
        )

    @property
    def gate_spec(self) -> GateSpec | None:
        return self.gate

    def build(self, scope: Scope) -> "GatedModule":
        return GatedModule(self, scope)

    def rule_without(self, branch: str, left: int) -> dict[str, Any]:
        return {"gate": self.gate.without_branch(branch).data() if self.gate and left > 1 else None}


class GatedModule(BaseFusion):
    """The module of `Gated`."""

    def fuse(self, features: Features, weights: Weights) -> Fused:
        if not weights:
            return next(iter(features.values()))
        return total(_times(h, weights[name]) for name, h in features.items())


def _times(h: Fused, weight: Tensor) -> Fused:
    """Features times the value of each of `units` equal groups of their channels."""
    units = weight.shape[-1]
    if units in (1, h.shape[-1]):
        return h * weight
    return rearrange(rearrange(h, "... (u c) -> ... u c", u=units) * weight[..., None], "... u c -> ... (u c)")
