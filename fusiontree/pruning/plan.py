"""A plan: which parts of which model go, and why. A file that people read before any weight is touched."""

import json
from collections.abc import Iterable
from typing import Literal

from fusiontree.core.model.model import LanguageModel
from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.spec.base import Spec
from fusiontree.pruning.evidence import Evidence, PruneError
from fusiontree.pruning.policies import Decision, Policy, PolicySpec
from fusiontree.pruning.surgery import carry, drop_from_spec, tensors, with_weights


class Plan(Spec):
    """The paths to drop from the model with the digest `spec`; `decisions` record a policy's reasons."""

    format: Literal[1] = 1
    spec: str
    drops: tuple[str, ...]
    policy: Policy | None = None
    decisions: tuple[Decision, ...] = ()

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(self.data(), indent=1) + "\n"

    def edit(self, spec: ModelSpec) -> ModelSpec:
        """The pruned spec.

        Raises:
            PruneError: the plan is for another spec, or drops what is not there.
        """
        if self.spec != spec.digest():
            raise PruneError(f"plan: made for the spec {self.spec}, this one is {spec.digest()}")
        return drop_from_spec(spec, self.drops) if self.drops else spec


def plan(spec: ModelSpec, evidence: Evidence, policy: PolicySpec) -> Plan:
    """Let a policy decide on every gated branch.

    Raises:
        PruneError: evidence of another model, or not enough of it.
    """
    evidence.check(spec)
    decisions = policy.decide(evidence)
    drops = tuple(decision.path for decision in decisions if decision.drop)
    made = Plan(spec=spec.digest(), drops=drops, policy=policy, decisions=tuple(decisions))
    made.edit(spec)
    return made


def plan_by_hand(spec: ModelSpec, drops: Iterable[str] | str) -> Plan:
    """A plan of the paths, or the path, that somebody names.

    Raises:
        PruneError: one of the paths cannot be dropped.
    """
    made = Plan(spec=spec.digest(), drops=(drops,) if isinstance(drops, str) else tuple(drops))
    made.edit(spec)
    return made


def apply(model: LanguageModel, plan: Plan) -> LanguageModel:
    """The pruned model; the one given stays as it is.

    Raises:
        PruneError: the plan is for another spec, or drops what is not there.
    """
    spec = plan.edit(model.spec)
    return with_weights(spec, carry(tensors(model), spec), training=model.training)
