"""Prefixes and borrowed keys: what a fresh pair of eyes broke, and bad specs in one line."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import fusiontree as ft
from fusiontree.errors import FusionTreeError, SpecError
from fusiontree.evaluation.gate_map import gate_maps
from fusiontree.training.parallel import shard, world

HEADS = {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 8, "window": 4, "encodings": ["rope"]}
READER = HEADS | {"keys_from": "layers.0.mixer"}
MLP = {"kind": "mlp", "hidden": 8}
GATED = {"kind": "gated", "branches": {"a": MLP, "b": MLP}, "gate": {"kind": "sigmoid", "granularity": "token"}}
TIMED = {"a": MLP | {"encodings": ["time"]}, "out": {"kind": "linear", "outputs": 16}}
DATA = {
    "vocab_size": 23,
    "width": 16,
    "prefix": {"tokens": 3},
    "encodings": {"rope": {"kind": "rope"}},
    "layers": [{"mixer": HEADS}, {"mixer": READER, "ffn": MLP}, {"mixer": READER}],
}
TOKENS = torch.randint(0, 23, (2, 15), generator=torch.Generator().manual_seed(0))


def spec(**changes):
    return ft.ModelSpec.parse(DATA | changes)


def gradients(model):
    model.cross_entropy(TOKENS, TOKENS).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.2)])
def test_borrowed_keys_pass_sharded_layers(precision, tolerance):
    wanted = gradients(ft.build(spec()))
    with world():
        found = gradients(shard(ft.build(spec()), init_device_mesh("cpu", (1,)), precision=precision))
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@torch.no_grad()
def test_statistics_and_maps_of_gates_are_those_of_the_text():
    model = ft.build(spec(layers=[{"mixer": HEADS}, {"mixer": GATED}]), dtype=torch.float64)
    for parameter in model.layers[1].mixer.gate.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    with model.observe() as seen:
        model(TOKENS, documents=torch.tensor([[0] * 7 + [1] * 8, [0] * 9 + [-1] * 6]))
    assert seen["layers.1.mixer.gate"]["a"].count == 24
    (found,) = gate_maps(model, TOKENS[0])
    assert found.values["a"].shape == (15, 1)
    with model.observe() as again:
        model(TOKENS[:1])
    assert float(found.values["a"].mean()) == pytest.approx(again["layers.1.mixer.gate"]["a"].mean, abs=1e-6)


def test_a_gate_that_is_used_twice_has_no_map():
    used = [{"mixer": {"kind": "use", "of": "block"}}] * 2
    model = ft.build(spec(prefix=None, encodings={}, shared={"block": GATED}, layers=used))
    with pytest.raises(FusionTreeError, match=r"gate map: shared.block.gate is used more than once"):
        gate_maps(model, TOKENS[0])


def test_gradients_pass_single_steps_whatever_is_trained():
    """Keys and states are written in place where no gradient can ask for them, even those of frozen maps."""
    mixers = [HEADS, READER, {"kind": "mamba1", "inner": 12, "state": 4, "rank": 2}]
    model = ft.build(spec(layers=[{"mixer": mixer} for mixer in mixers]), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("layers.0.mixer.q.weight", "layers.2.mixer.A_log"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cache = model.new_cache(2, 15)
    stepped = torch.cat([model(token, cache=cache) for token in TOKENS.split(1, 1)], 1)
    last = torch.autograd.grad(stepped[:, -1].square().sum(), trained, allow_unused=True)
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in last)
    torch.testing.assert_close(stepped, model(TOKENS), rtol=1e-9, atol=1e-9)


def test_a_shared_map_may_be_parametrised():
    shared = {"block": {"kind": "swiglu", "hidden": 8}}
    model = ft.build(spec(prefix=None, encodings={}, shared=shared, layers=[{"ffn": {"kind": "use", "of": "block"}}]))
    before = model(TOKENS)
    torch.nn.utils.parametrizations.weight_norm(model.shared["block"].up)
    torch.testing.assert_close(model(TOKENS), before)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"layers": [{"mixer": HEADS}, {"mixer": READER | {"encodings": []}}]},
            r"layers.1.mixer: encodings: keys stand in those of layers.0.mixer, rope, found none",
        ),
        (
            {"layers": [{"mixer": READER | {"keys_from": "layers.1.mixer"}}, {"mixer": HEADS}]},
            r"layers.0.mixer: expected an earlier layer, found layers.1.mixer",
        ),
        (
            {"layers": [{"ffn": MLP}, {"mixer": READER | {"keys_from": "layers.0.ffn"}}]},
            r"layers.1.mixer: keys_from: layers.0.ffn is no attention, found mlp",
        ),
        (
            {"prefix": {"tokens": 64}, "encodings": {"rope": {"kind": "srte_learned", "max_length": 64}}},
            r"prefix.tokens: leaves none of the 64 positions of an encoding, found 64",
        ),
        (
            {
                "encodings": {"time": {"kind": "srte_sincos"}},
                "layers": [
                    {"mixer": {"kind": "chain", "links": TIMED, "embedding": True}},
                ],
            },
            r"layers.0.mixer.links.a.encodings: 'time' is added to features of the stream's width 16, here are 32",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(changes, line):
    with pytest.raises(SpecError, match=line):
        spec(**changes)


def test_positions_are_those_that_callers_know():
    time = {"rope": {"kind": "srte_learned", "max_length": 16}}
    model = ft.build(spec(encodings=time))
    assert model.spec.longest == 13
    model(TOKENS[:, :13])
    with pytest.raises(FusionTreeError, match="found position 14, it was made for 13 positions"):
        model(TOKENS)
