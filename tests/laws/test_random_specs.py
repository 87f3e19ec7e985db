"""The laws hold for random specs, and random plans prune them exactly: 60 specs and 120 plans each time, and 390 and
780 more among the slow tests."""

import random

import pytest
import torch
from random_specs import for_random_specs, parts

from fusiontree.core.model.cost import costs
from fusiontree.pruning import PruneError, apply, droppable, plan_by_hand, simplify, verify
from fusiontree.testing import LAWS, check_spec
from fusiontree.testing.subject import Subject, difference

torch.set_num_threads(1)
PLANS = 2
HERE = tuple(law for law in LAWS if law.name != "narrowed")
"""`test_narrowing` has narrowings of the same specs, and more random ones."""


@pytest.mark.parametrize("part", parts())
def test_laws(part):
    for_random_specs(part, lambda spec: check_spec(spec, laws=HERE) and None)


@pytest.mark.parametrize("part", parts())
def test_random_plans_prune_exactly(part):
    for_random_specs(part, plans_prune_exactly)


def plans_prune_exactly(spec):
    choose = random.Random(spec.digest())
    for _ in range(PLANS):
        plan = random_plan(spec, choose)
        model = Subject(spec).model
        pruned = apply(model, plan).eval()
        verify(model, pruned, plan, length=12)  # float64 1e-10 and float32 1e-5, prefill and decode
        assert costs(pruned.spec, length=8)[0].parameters == sum(p.numel() for p in pruned.parameters())
        assert names_of(pruned.spec) == set(pruned.spec.encodings)
        simple, _ = simplify(pruned)
        tokens = Subject(spec).tokens(2, 9)
        assert not difference(simple.eval()(tokens), pruned(tokens), 1e-10)


def random_plan(spec, choose):
    """A plan of random paths; those that may not go together with the others are left out."""
    drops = []
    for path in choose.sample(droppable(spec), k=len(droppable(spec))):
        if choose.random() < 0.4:
            try:
                plan_by_hand(spec, [*drops, path])
            except PruneError:
                continue
            drops.append(path)
    return plan_by_hand(spec, drops)


def names_of(spec):
    return {name for _, node in spec.nodes() for name in getattr(node, "encodings", ())}
