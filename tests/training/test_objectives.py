"""Objectives: values known by hand, gradients by finite differences, and sums that no cut of a step changes, of every
kind that is registered."""

import math

import pytest
import torch
import torch.nn.functional as F

from fusiontree import ModelSpec, build
from fusiontree.core.probes import probes
from fusiontree.data import IGNORED
from fusiontree.testing.subject import randomised
from fusiontree.training.objectives import Balance, GateValues, StepPart, objectives
from fusiontree.training.objectives.balance import balance
from fusiontree.training.objectives.base import captured
from fusiontree.training.objectives.entropy import entropy

KINDS = objectives.names()


def gate_values(logits: torch.Tensor, real: torch.Tensor | None) -> GateValues:
    """A softmax gate from logits [..., branches]."""
    return GateValues(dict(zip("abc", logits.softmax(-1).unbind(-1), strict=False)), real)


def example(rows: int = 4, time: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (rows, time), generator=draw)
    labels[torch.rand(rows, time, generator=draw) < 0.3] = IGNORED
    real = torch.arange(time) < torch.randint(2, time + 1, (rows, 1), generator=draw)
    labels[~real] = IGNORED
    return {
        "logits": torch.randn(rows, time, 7, generator=draw, dtype=dtype, requires_grad=True),
        "labels": labels,
        "dynamic": torch.randn(rows, time, 3, 2, generator=draw, dtype=dtype, requires_grad=True),
        "static": torch.randn(4, 3, generator=draw, dtype=dtype, requires_grad=True),
        "real": real,
    }


def value(kind: str, e: dict[str, torch.Tensor], rows: slice = slice(None)) -> torch.Tensor:
    gates = [gate_values(e["dynamic"][rows], e["real"][rows]), gate_values(e["static"], None)]
    count = int((e["labels"] != IGNORED).sum())
    part = StepPart(nats(e["logits"][rows], e["labels"][rows]), e["labels"][rows], count, gates)
    return objectives.get(kind)().value(part)


def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def test_balance_is_0_for_equal_shares_and_most_for_one_alone():
    assert float(balance(torch.tensor([0.25] * 4))) == pytest.approx(0)
    assert float(balance(torch.tensor([0.0, 1.0, 0.0]))) == pytest.approx(2)
    assert float(balance(torch.tensor([0.6, 0.4], dtype=torch.float64))) == pytest.approx(2 * (0.36 + 0.16) - 1)


def test_entropy_is_1_for_equal_shares_and_0_for_a_decision():
    found = entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]]))
    by_hand = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert found.tolist() == pytest.approx([1, 0, by_hand])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    e = example()
    leaves = (e["logits"], e["dynamic"], e["static"])
    assert torch.autograd.gradcheck(lambda a, b, c: value(kind, e | {"logits": a, "dynamic": b, "static": c}), leaves)


def test_a_share_of_exactly_0_has_a_finite_gradient():
    closed = torch.tensor([[1.0, 0.0]], requires_grad=True)
    entropy(closed.clamp(0, 1)).sum().backward()
    assert closed.grad is not None
    assert torch.isfinite(closed.grad).all()


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_of_a_step_gives_the_same_sum_and_gradient(kind, cut):
    e = example()
    leaves = [e[name] for name in ("logits", "dynamic", "static")]
    whole = torch.autograd.grad(value(kind, e), leaves, allow_unused=True)
    parts = value(kind, e, slice(0, cut)) + value(kind, e, slice(cut, None))
    torch.testing.assert_close(parts, value(kind, e))
    assert any(gradient is not None for gradient in whole)
    for one, other in zip(torch.autograd.grad(parts, leaves, allow_unused=True), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_objectives_look_at_real_tokens_only(kind):
    e = example()
    garbage = torch.where(e["real"][..., None, None], e["dynamic"], 100.0)
    torch.testing.assert_close(value(kind, e | {"dynamic": garbage}), value(kind, e))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if objectives.get(kind).reads_gates])
def test_what_is_minimised_of_gates_falls(kind):
    logits = torch.tensor([[0.5, -0.2], [0.3, 0.6]], requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    seen = []
    for _ in range(20):
        part = StepPart(torch.tensor(4.0), torch.tensor([[1, 2]]), 2, [gate_values(logits, None)])
        found = objectives.get(kind)().value(part)
        seen.append(float(found.detach()))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("more", [{}, {"prefix": {"tokens": 3}}])
def test_captured_values_are_those_of_the_forward_pass(data, more):
    model = randomised(build(ModelSpec.parse(data["model"] | more)), 0)
    tokens, documents = torch.randint(0, 257, (2, 6)), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])
    with captured(probes.gates(model)) as gates, model.observe() as observation:
        model(tokens, documents=documents)
    assert len(gates) == 2
    first, seen = gates[0], observation["layers.0.mixer.gate"]
    assert first.real is not None
    assert int(first.real.sum()) == 10
    for branch, values in first.values.items():
        assert float(values[first.real].detach().mean()) == pytest.approx(seen[branch].mean)
        assert values.requires_grad
    model(tokens, documents=documents)
    assert len(gates) == 2, "the hooks are still there"


def test_objectives_see_neither_padding_nor_the_prefix(data):
    """Whatever stands there: the terms are those of the gates' values at tokens."""
    model = randomised(build(ModelSpec.parse(data["model"] | {"prefix": {"tokens": 3}}), dtype=torch.float64), 0)
    tokens, documents = torch.arange(12).reshape(2, 6), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])
    labels = torch.where(documents >= 0, tokens, IGNORED)
    seen: dict[str, dict[str, torch.Tensor]] = {}
    with (
        captured(probes.gates(model)) as gates,
        probes.watch(probes.gates(model), lambda p, w, real: seen.update({p: w})),
    ):
        model(tokens, documents=documents)
    found = Balance().value(StepPart(torch.tensor(0.0, dtype=torch.float64), labels, 10, gates[:1]))
    # row 0: prefix, 3 tokens, prefix, 3 tokens; row 1: prefix, 4 tokens, padding
    real = [[False] * 3 + [True] * 3 + [False] * 3 + [True] * 3, [False] * 3 + [True] * 4 + [False] * 5]
    values = torch.stack(list(seen["layers.0.mixer.gate"].values()), -1)
    rows = [row[torch.tensor(mask)].mean((0, 1)) for row, mask in zip(values, real, strict=True)]
    wanted = sum(share * balance(row) for share, row in zip((0.6, 0.4), rows, strict=True))
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
