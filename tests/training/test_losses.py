"""Losses: values known by hand, gradients by finite differences, and sums that no cut of a step changes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree import ModelSpec, build
from fusiontree.core.probes import probes
from fusiontree.data import IGNORED
from fusiontree.testing.subject import randomised
from fusiontree.training import LossesSpec
from fusiontree.training.losses import GateValues, balance, captured, entropy, terms

WEIGHTS = LossesSpec(balance=0.7, entropy=0.3)


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


def total(e: dict[str, torch.Tensor], rows: slice = slice(None)) -> torch.Tensor:
    gates = [gate_values(e["dynamic"][rows], e["real"][rows]), gate_values(e["static"], None)]
    count = int((e["labels"] != IGNORED).sum())
    return terms(nats(e["logits"][rows], e["labels"][rows]), e["labels"][rows], count, gates).total(WEIGHTS)


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


def test_gradients_are_those_of_finite_differences():
    e = example()
    leaves = (e["logits"], e["dynamic"], e["static"])
    assert torch.autograd.gradcheck(lambda a, b, c: total(e | {"logits": a, "dynamic": b, "static": c}), leaves)


def test_a_share_of_exactly_0_has_a_finite_gradient():
    closed = torch.tensor([[1.0, 0.0]], requires_grad=True)
    entropy(closed.clamp(0, 1)).sum().backward()
    assert closed.grad is not None
    assert torch.isfinite(closed.grad).all()


@given(st.integers(1, 3))
@settings(deadline=None)
def test_any_cut_of_a_step_gives_the_same_sum_and_gradient(cut):
    e = example()
    names = ("logits", "dynamic", "static")
    whole = torch.autograd.grad(total(e), [e[name] for name in names])
    parts = total(e, slice(0, cut)) + total(e, slice(cut, None))
    torch.testing.assert_close(parts, total(e))
    for one, other in zip(torch.autograd.grad(parts, [e[name] for name in names]), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_terms_look_at_real_tokens_only():
    e = example()
    garbage = torch.where(e["real"][..., None, None], e["dynamic"], 100.0)
    torch.testing.assert_close(total(e | {"dynamic": garbage}), total(e))


def test_a_positive_weight_lowers_its_term():
    for name in ("balance", "entropy"):
        logits = torch.tensor([[0.5, -0.2], [0.3, 0.6]], requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=0.5)
        seen = []
        for _ in range(20):
            found = terms(torch.tensor(4.0), torch.tensor([[1, 2]]), 2, [gate_values(logits, None)])
            seen.append(float(getattr(found, name).detach()))
            optimizer.zero_grad()
            (found.total(LossesSpec.parse({name: 1.0})) - found.cross_entropy).backward()
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


def test_losses_see_neither_padding_nor_the_prefix(data):
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
    found = terms(torch.tensor(0.0, dtype=torch.float64), labels, 10, gates[:1])
    # row 0: prefix, 3 tokens, prefix, 3 tokens; row 1: prefix, 4 tokens, padding
    real = [[False] * 3 + [True] * 3 + [False] * 3 + [True] * 3, [False] * 3 + [True] * 4 + [False] * 5]
    values = torch.stack(list(seen["layers.0.mixer.gate"].values()), -1)
    rows = [row[torch.tensor(mask)].mean((0, 1)) for row, mask in zip(values, real, strict=True)]
    wanted = sum(share * balance(row) for share, row in zip((0.6, 0.4), rows, strict=True))
    assert float(found.balance.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
