"""Gate maps hold the gates' values, the figure is drawn, and decoding is measured on the cache it fills."""

import pytest
import torch

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.evaluation.decode import measure_decode
from fusiontree.evaluation.gate_map import draw, gate_maps
from fusiontree.testing.subject import randomised

torch.set_num_threads(1)
PART = {"kind": "mlp", "hidden": 8}


def model(*gates):
    """A layer for each gate."""
    layers = [{"mixer": {"kind": "gated", "branches": {"a": PART, "b": PART}, "gate": gate}} for gate in gates]
    spec = ft.ModelSpec.model_validate({"vocab_size": 257, "width": 16, "layers": layers})
    return randomised(ft.build(spec), 0)


def test_values_are_what_the_gates_say_while_the_model_runs():
    gated = model({"kind": "sigmoid", "granularity": "channel"}, {"kind": "softmax", "granularity": "layer"})
    tokens = torch.arange(7)
    maps = gate_maps(gated, tokens)
    assert [(gate.path, gate.branches, tuple(gate.values.shape)) for gate in maps] == [
        ("layers.0.mixer.gate", ("a", "b"), (7, 16)),
        ("layers.1.mixer.gate", ("a", "b"), (7, 1)),
    ]
    with gated.observe() as seen:
        gated(tokens[None])
    for gate in maps:
        assert float(gate.values.mean()) == pytest.approx(seen[gate.path]["a"].mean, abs=1e-6)


def test_hooks_are_gone_and_the_model_trains_on_afterwards():
    gated = model({"kind": "sigmoid"}).train()
    gate_maps(gated, torch.arange(3))
    assert not gated.layers[0].mixer.gate._forward_hooks
    assert gated.training
    assert gated.layers[0].training


def test_a_model_without_gates_is_refused():
    plain = ft.build(ft.ModelSpec.model_validate({"vocab_size": 5, "width": 8, "layers": [{"ffn": PART}]}))
    with pytest.raises(FusionTreeError, match="the model has no gate"):
        gate_maps(plain, torch.arange(3))


def test_the_figure_is_written_for_gates_of_unequal_units(tmp_path):
    gated = model({"kind": "sigmoid", "granularity": "channel"}, {"kind": "sigmoid", "granularity": "token"})
    text = "def f(x):\n\treturn x"
    draw(gate_maps(gated, torch.tensor(list(text.encode()))), text, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_decode_reports_the_bytes_of_the_cache_it_filled():
    spec = ft.load_spec("quickstart")
    found = measure_decode(ft.build(spec), prompt=10, steps=8)
    assert found.cache_bytes == ft.build(spec, device="meta").new_cache(1, 18).nbytes
    assert found.tokens_per_second > 0
