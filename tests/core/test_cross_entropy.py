"""The loss without its logits is torch's loss of all logits, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from core_cases import VOCABULARY, model, tokens

from fusiontree.core.model import chunked_loss as module
from fusiontree.core.model.chunked_loss import cross_entropy
from fusiontree.errors import FusionTreeError

HEADS = {
    "tied": {"tied": True},
    "own": {"tied": False, "bias": True},
    "capped": {"tied": False, "multiplier": 0.5, "softcap": 3.0},
}


def labels(rows: int, time: int) -> torch.Tensor:
    found = tokens(rows, time, seed=3)
    found[:, ::4] = -100
    return found


@pytest.fixture(params=[1, 3, 10**6], ids=lambda tokens: f"{tokens} at a time")
def chunk(request, monkeypatch):
    """How many tokens have their logits at a time."""
    monkeypatch.setattr(module, "SMALL", request.param * VOCABULARY)
    return request.param


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_models_loss_is_that_of_its_logits(head, chunk):
    net, x, y = model(head=head), tokens(2, 19), labels(2, 19)
    documents = torch.tensor([[0] * 11 + [1] * 8, [0] * 15 + [-1] * 4])
    y = y.masked_fill(documents < 0, -100)
    expected = F.cross_entropy(net(x, documents=documents).flatten(0, 1), y.flatten(), reduction="sum")
    found = net.cross_entropy(x, y, documents=documents)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    parameters = list(net.parameters())
    pairs = zip(
        torch.autograd.grad(found * 0.3, parameters), torch.autograd.grad(expected * 0.3, parameters), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    with torch.no_grad():  # norms are made of fewer operations then
        torch.testing.assert_close(net.cross_entropy(x, y, documents=documents), found.detach(), rtol=1e-14, atol=0)


def linear(features, weight, bias=None):
    return F.linear(features, weight, bias)


def test_gradients_are_those_of_finite_differences(chunk):
    draw = torch.Generator().manual_seed(0)
    shapes = (7, 5), (VOCABULARY, 5), (VOCABULARY,)
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *i: cross_entropy(linear, labels(1, 7)[0], *i), inputs)


@pytest.mark.parametrize("frozen", [0, 1], ids=["features", "weight"])
def test_only_what_is_wanted_has_a_gradient(frozen):
    inputs = [torch.randn(6, 5, requires_grad=frozen != 0), torch.randn(VOCABULARY, 5, requires_grad=frozen != 1)]
    cross_entropy(linear, labels(1, 6)[0], *inputs).backward()
    assert [tensor.grad is None for tensor in inputs] == [frozen == 0, frozen == 1]


def test_no_more_logits_than_a_chunk_are_made_at_once(chunk):
    sizes = []

    def head(features, weight):
        sizes.append(len(features))
        return F.linear(features, weight)

    features = torch.randn(40, 2, requires_grad=True)
    cross_entropy(head, labels(1, 40)[0], features, torch.randn(VOCABULARY, 2)).backward()
    few = max(chunk, features.numel() // VOCABULARY)
    assert max(sizes) <= few
    assert sum(sizes) == 40


def test_bfloat16_sums_over_chunks_in_float32(monkeypatch):
    monkeypatch.setattr(module, "SMALL", VOCABULARY)
    draw = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(n, 4, generator=draw).bfloat16() for n in (4000, VOCABULARY))
    weight.requires_grad_()
    exact = weight.detach().double().requires_grad_()
    targets = torch.zeros(4000, dtype=torch.long)  # every chunk moves the weight the same way
    found = cross_entropy(linear, targets, features, weight)
    expected = cross_entropy(linear, targets, features.double(), exact)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=3e-3, atol=0)
    (grad,), (true,) = torch.autograd.grad(found, weight), torch.autograd.grad(expected, exact)
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - true).norm() < 4e-3 * true.norm()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (torch.zeros(2, 4, dtype=torch.long), r"labels: expected an integer tensor \[2, 5\], .* \[2, 4\] int64"),
        (torch.zeros(2, 5), r"labels: expected an integer tensor \[2, 5\], .* float32"),
        (None, "labels: expected an integer tensor .* found NoneType"),
        (torch.full((2, 5), VOCABULARY), rf"labels: found {VOCABULARY}, the vocabulary is 0..{VOCABULARY - 1}"),
        (torch.full((2, 5), -1), "labels: found -1, the vocabulary is"),
    ],
    ids=str,
)
def test_labels_that_do_not_fit_are_refused(wrong, line):
    with pytest.raises(FusionTreeError, match=line):
        model().cross_entropy(tokens(2, 5), wrong)


def test_labels_may_be_any_integers():
    net, x, y = model(), tokens(2, 5), labels(2, 5)
    assert net.cross_entropy(x, y.int()) == net.cross_entropy(x, y)
