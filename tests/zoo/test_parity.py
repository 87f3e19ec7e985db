"""Every family is transformers' own model: logits, gradients, and all ways of cutting a sequence, always against
transformers' full forward pass (its own caches are wrong for some families)."""

import importlib.util

import pytest
import torch
from public import CONFIGS, VOCABULARY, Pair, pair

TOLERANCE, OF_DELTA_RULES = 2e-5, 1e-4
"""Delta rules make more of what is rounded: either side is 2e-5 off from itself in float64."""
TIME = 37
"""Longer than every window, and no multiple of any block."""


@pytest.fixture(scope="module", params=CONFIGS)
def both(request) -> Pair:
    return pair(request.param)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, TIME), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(both: Pair, tokens: torch.Tensor) -> torch.Tensor:
    return both.theirs(tokens, use_cache=False).logits


def tolerance(both: Pair) -> float:
    delta = any(getattr(node, "kind", None) == "gated_delta" for _, node in both.ours.spec.nodes())
    return OF_DELTA_RULES if delta else TOLERANCE


def close(both: Pair, found: torch.Tensor, tokens: torch.Tensor) -> None:
    wanted = expected(both, tokens)
    scale = max(1.0, float(wanted.abs().max()))
    assert float((found - wanted).abs().max()) <= tolerance(both) * scale


def test_transformers_runs_its_own_torch_code():
    for package in ("mamba_ssm", "causal_conv1d", "fla"):
        assert importlib.util.find_spec(package) is None, f"{package} would be used silently"


@torch.no_grad()
def test_logits(both, tokens):
    close(both, both.ours(tokens), tokens)


def test_gradients(both, tokens):
    weights = torch.randn(2, TIME, VOCABULARY, generator=torch.Generator().manual_seed(2))
    (both.theirs(tokens, use_cache=False).logits * weights).sum().backward()
    (both.ours(tokens) * weights).sum().backward()
    theirs = {name: parameter.grad for name, parameter in both.theirs.named_parameters()}
    here = {n: p.grad for n, p in both.ours.named_parameters()} | dict(both.ours.named_buffers())
    found = both.family.weights_to(both.config, here)
    for module in (both.ours, both.theirs):
        module.zero_grad()
    saved = set(both.theirs.state_dict()) - set(both.family.computed(both.family.options(both.config)))
    assert set(found) == set(theirs) | {name for name, _ in both.theirs.named_buffers() if name in saved}
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)  # sums of large terms that cancel
        assert float((found[name] - gradient).abs().max()) <= 10 * TOLERANCE * scale, name


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * TIME, [20, *[1] * 17], [5, 13, 1, 18], [12, 25]], ids=str)
def test_decoding_and_chunked_prefill_are_the_full_forward(both, tokens, cuts):
    cache = both.ours.new_cache(2, TIME)
    found = [both.ours(chunk, cache=cache) for chunk in tokens.split(cuts, 1)]
    close(both, torch.cat(found, 1), tokens)


@torch.no_grad()
def test_left_padding_changes_nothing(both, tokens):
    padded = torch.cat([torch.zeros(2, 9, dtype=torch.long), tokens], 1)
    documents = torch.zeros_like(padded)
    documents[:, :9] = -1
    close(both, both.ours(padded, documents=documents)[:, 9:], tokens)


@torch.no_grad()
def test_packed_documents_are_the_documents_alone(both, tokens):
    row = tokens.reshape(1, -1)
    documents = torch.arange(2).repeat_interleave(TIME)[None]
    close(both, both.ours(row, documents=documents).reshape(2, TIME, -1), tokens)


def test_round_trips_are_bitwise(both):
    assert both.family.spec_of(both.family.config_of(both.ours.spec)) == both.ours.spec
    theirs = both.theirs.state_dict()
    config = both.family.config_of(both.ours.spec)
    back = both.family.weights_to(config, both.ours.state_dict())
    options = both.family.options(config)
    assert set(back) == set(theirs) - set(both.family.computed(options)) - set(both.family.all_copies(both.config))
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    again = both.family.weights_of(config, back)
    assert all(torch.equal(again[name], tensor) for name, tensor in both.ours.state_dict().items())


def test_transformers_reads_our_config(both):
    config = type(both.theirs.config)(**both.family.config_of(both.ours.spec))
    again = type(both.theirs)(config)
    computed = both.family.computed(both.family.options(both.config))

    def shapes(model):
        return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in computed}

    assert shapes(again) == shapes(both.theirs)
