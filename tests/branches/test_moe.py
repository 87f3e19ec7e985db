"""Experts beside the plainest form of the same: a loop over tokens and the experts that each visits."""

import pytest
import torch
import torch.nn.functional as F

import fusiontree as ft
from fusiontree.core.contracts.node import Scope
from fusiontree.core.model.initialise import initialise
from fusiontree.errors import SpecError
from fusiontree.testing.subject import randomised

torch.set_num_threads(1)
WIDTH = 8
SMALL = {"kind": "moe", "experts": 6, "top_k": 2, "hidden": 6}
ROUTERS = [
    {"scores": "softmax", "renormalise": False},
    {"scores": "softmax", "renormalise": True, "multiplier": 1.7},
    {"scores": "sigmoid", "renormalise": False, "multiplier": 0.3},
    {"scores": "sigmoid", "renormalise": True, "correction": True},
    {"scores": "softmax", "correction": True},
    {"scores": "sigmoid", "correction": True, "groups": 3, "top_groups": 2},
    {"scores": "softmax", "groups": 6, "top_groups": 5},
    {"scores": "sigmoid", "groups": 3, "top_groups": 3, "multiplier": 0.3},
]


def built(**options):
    spec = ft.branches.Moe.model_validate(SMALL | options)
    branch = spec.build(Scope(WIDTH, {})).double()
    initialise(branch, 0)
    return randomised(branch, 1)


def tokens(rows=3, time=7):
    return torch.randn(rows, time, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def network(x, gate, up, down):
    inner = F.relu(up @ x) ** 2 if gate is None else F.silu(gate @ x) * (up @ x)
    return down @ inner


def one_token(branch, x):
    """The branch's output for one token, by its definition."""
    spec, weights, router = branch.spec, dict(branch.state_dict(keep_vars=True)), branch.spec.router
    logits = weights["router.weight"] @ x
    scores = logits.softmax(0) if router.scores == "softmax" else logits.sigmoid()
    ranks = scores + weights["correction"] if router.correction else scores
    groups = [expert // (spec.experts // router.groups) for expert in range(spec.experts)]
    sums = [sum(sorted(r.item() for r, own in zip(ranks, groups, strict=True) if own == g)[-2:]) for g in set(groups)]
    best = sorted(set(groups), key=lambda group: -sums[group])[: router.top_groups]
    open_to = [expert for expert in range(spec.experts) if groups[expert] in best]
    chosen = sorted(open_to, key=lambda expert: -ranks[expert].item())[: spec.top_k]
    total = sum(scores[expert] for expert in chosen) if router.renormalise else 1.0
    maps = {name: weights.get(f"experts.{name}") for name in ("gate", "up", "down")}
    y = torch.zeros_like(x)
    for expert in chosen:
        gate = None if maps["gate"] is None else maps["gate"][expert]
        made = network(x, gate, maps["up"][expert], maps["down"][expert])
        y = y + router.multiplier * scores[expert] / total * made
    if spec.shared_hidden:
        shared = network(x, *(weights.get(f"shared.{name}.weight") for name in ("gate", "up", "down")))
        y = y + (shared * torch.sigmoid(weights["shared_gate.weight"] @ x) if spec.shared_gate else shared)
    return y


def run(branch, x):
    return branch(x, ft.Context(torch.arange(x.shape[1]).expand(x.shape[:2])))


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize(
    "more",
    [{}, {"activation": "relu2", "shared_hidden": 4}, {"shared_hidden": 3, "shared_gate": True}, {"top_k": 4}],
    ids=str,
)
def test_values_and_gradients_are_those_of_a_loop(router, more):
    branch, x = built(router=router, **more), tokens().requires_grad_()
    found = run(branch, x)
    wanted = torch.stack([torch.stack([one_token(branch, token) for token in row]) for row in x])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    leaves, weights = [x, *branch.parameters()], torch.randn_like(wanted)
    pairs = [torch.autograd.grad((y * weights).sum(), leaves) for y in (found, wanted)]
    for first, second in zip(*pairs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@torch.no_grad()
def test_all_tokens_may_want_one_expert():
    branch = built(top_k=1)
    alike = tokens(1, 1).expand(4, 9, WIDTH)
    torch.testing.assert_close(run(branch, alike)[2, 3], one_token(branch, alike[0, 0]), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_broken_token_breaks_no_other():
    branch, x = built(shared_hidden=4), tokens()
    broken = x.clone()
    broken[1, 3] = torch.nan
    found, wanted = run(branch, broken), run(branch, x)
    keep = torch.ones(3, 7, dtype=torch.bool)
    keep[1, 3] = False
    assert torch.equal(found[keep].isfinite(), torch.ones_like(found[keep], dtype=torch.bool))
    torch.testing.assert_close(found[keep], wanted[keep], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"top_k": 7}, "layers.0.ffn.top_k: found 7, there are 6 experts"),
        ({"router": {"groups": 4}}, "layers.0.ffn.router.groups: 4 groups do not divide 6 experts"),
        ({"router": {"groups": 2, "top_groups": 3}}, "layers.0.ffn.router.top_groups: found 3, groups is 2"),
        (
            {"router": {"groups": 3, "top_groups": 1}, "top_k": 3},
            "layers.0.ffn.top_k: found 3, in 1 of 3 groups are 2 experts",
        ),
        ({"shared_gate": True}, "layers.0.ffn.shared_gate: shared_hidden is null: there is no shared network"),
        ({"router": {"scores": "tanh"}}, "layers.0.ffn.router.scores: expected 'softmax' or 'sigmoid'"),
        ({"experts": 0}, "layers.0.ffn.experts: expected a number greater than or equal to 1, found 0"),
    ],
    ids=str,
)
def test_a_spec_that_does_not_fit_is_one_line(changes, line):
    with pytest.raises(SpecError) as caught:
        ft.ModelSpec.parse({"vocab_size": 11, "width": WIDTH, "layers": [{"ffn": SMALL | changes}]})
    assert str(caught.value).startswith(line)


@torch.no_grad()
def test_what_is_not_learned_is_saved_and_starts_at_0(tmp_path):
    ffn = SMALL | {"router": {"correction": True}}
    model = ft.build(ft.ModelSpec.parse({"vocab_size": 11, "width": WIDTH, "layers": [{"ffn": ffn}]}))
    correction = model.get_buffer("layers.0.ffn.correction")
    assert torch.equal(correction, torch.zeros(6))
    correction.add_(torch.arange(6.0))
    ft.save(model, tmp_path / "saved")
    assert torch.equal(ft.load(tmp_path / "saved").get_buffer("layers.0.ffn.correction"), torch.arange(6.0))


@pytest.mark.parametrize("more", [{}, {"activation": "relu2"}, {"top_k": 4, "shared_hidden": 3}], ids=str)
def test_a_token_alone_has_the_values_and_gradients_that_it_has_among_others(more):
    branch, x = built(**more), tokens(rows=1, time=5).requires_grad_()
    alone, among = run(branch, x[:, :1]), run(branch, x)[:, :1]
    torch.testing.assert_close(alone, among, rtol=0, atol=1e-12)
    leaves = [x, *branch.parameters()]
    pairs = zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (alone, among)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
