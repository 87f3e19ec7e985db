"""Pruning as an edit of the spec: evidence -> plan -> apply -> verify, each stage a file, and `simplify` apart."""

from fusiontree.core.model.narrow import narrow_spec, narrow_weights
from fusiontree.pruning.evidence import Evidence, PruneError
from fusiontree.pruning.plan import Plan, apply, plan, plan_by_hand
from fusiontree.pruning.policies import Policy, Threshold, TopK, policies
from fusiontree.pruning.simplify import simplify, simplify_spec, still_needed
from fusiontree.pruning.surgery import carry, drop_from_spec, droppable, narrow
from fusiontree.pruning.verify import Verdict, verify

__all__ = [
    "Evidence",
    "Plan",
    "Policy",
    "PruneError",
    "Threshold",
    "TopK",
    "Verdict",
    "apply",
    "carry",
    "drop_from_spec",
    "droppable",
    "narrow",
    "narrow_spec",
    "narrow_weights",
    "plan",
    "plan_by_hand",
    "policies",
    "simplify",
    "simplify_spec",
    "still_needed",
    "verify",
]
