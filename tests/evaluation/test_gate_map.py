"""Gate maps hold the gates' values, the figure is drawn, and decoding is measured on the cache it fills."""

import pytest
import torch
from matplotlib.figure import Figure

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.evaluation.decode import measure_decode
from fusiontree.evaluation.gate_map import draw, gate_maps
from fusiontree.testing.subject import randomised

torch.set_num_threads(1)
PART = {"kind": "mlp", "hidden": 8}


def model(*gates, branches="ab"):
    """A layer for each gate."""
    parts = dict.fromkeys(branches, PART)
    layers = [{"mixer": {"kind": "gated", "branches": parts, "gate": gate}} for gate in gates]
    spec = ft.ModelSpec.model_validate({"vocab_size": 257, "width": 16, "layers": layers})
    return randomised(ft.build(spec), 0)


def test_values_are_what_the_gates_say_while_the_model_runs():
    gated = model({"kind": "sigmoid", "granularity": "channel"}, {"kind": "softmax", "granularity": "layer"})
    tokens = torch.arange(7)
    maps = gate_maps(gated, tokens)
    assert [(gate.path, gate.branches, tuple(gate.values["b"].shape)) for gate in maps] == [
        ("layers.0.mixer.gate", ("a", "b"), (7, 16)),
        ("layers.1.mixer.gate", ("a", "b"), (7, 1)),
    ]
    with gated.observe() as seen:
        gated(tokens[None])
    for gate in maps:
        for branch, value in gate.values.items():
            assert float(value.mean()) == pytest.approx(seen[gate.path][branch].mean, abs=1e-6)


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


GRANULARITIES = [{"granularity": "channel"}, {"granularity": "head", "heads": 4}] + [
    {"granularity": name} for name in ("token", "layer")
]


@pytest.fixture
def figures(monkeypatch):
    """The axes of every figure as it is written."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (drawn.append(self), save(self, *args, **more)))
    return drawn


def rows(axes):
    """A panel's rows by their labels."""
    (image,) = axes.get_images()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(labels, image.get_array(), strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kind", "branches"), [("sigmoid", "ab"), ("softmax", "abc")])
def test_every_branch_is_shown_and_an_equal_share_is_the_middle(kind, branches, tmp_path, figures):
    gated = model(*({"kind": kind} | each for each in GRANULARITIES), branches=branches)
    with torch.no_grad():
        for parameter in gated.layers[3].mixer.gate.parameters():
            parameter.zero_()
    text = "def f(x):\n\treturn $x$"
    draw(gate_maps(gated, torch.tensor(list(text.encode()))), text, tmp_path / "gates.png", title="Mine")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    along, across, scale = figures[0].axes
    names = ["", ""] if kind == "sigmoid" else [f" {branch}" for branch in branches]
    wanted = [f"layers.{layer}{name}" for layer in range(4) for name in dict.fromkeys(names)]
    assert list(rows(along)) == wanted
    assert rows(along)[wanted[-1]].tolist() == pytest.approx([0.5] * len(text))
    assert list(rows(across)) == [label for label in wanted if label.startswith(("layers.0", "layers.1"))]
    assert along.get_title(loc="left").startswith("Mine")
    middle = "both alike" if kind == "sigmoid" else "equal share"
    assert scale.get_yticklabels()[1].get_text() == middle


def test_gates_of_one_unit_have_no_panel_of_units(tmp_path, figures):
    draw(gate_maps(model({"kind": "sigmoid", "granularity": "token"}), torch.arange(2)), "ab", tmp_path / "gates.png")
    assert len(figures[0].axes) == 2  # the text's and the scale's


@pytest.mark.filterwarnings("error")
def test_characters_of_several_bytes_stand_at_their_first_and_none_is_a_box(tmp_path, figures):
    text = "\u4e16a"
    draw(gate_maps(model({"kind": "sigmoid"}), torch.tensor(list(text.encode()))), text, tmp_path / "gates.png")
    assert [label.get_text() for label in figures[0].axes[0].get_xticklabels()] in (
        ["\u4e16", "", "", "a"],
        ["4e16", "", "", "a"],  # where no font has it
    )


@pytest.mark.parametrize("text", ["ab", "abcd", ["a", "b"], ""])
def test_labels_for_another_number_of_tokens_are_refused(text, tmp_path):
    maps = gate_maps(model({"kind": "sigmoid"}), torch.arange(3))
    with pytest.raises(FusionTreeError, match="3 tokens need as many labels, found"):
        draw(maps, text, tmp_path / "gates.png")
    assert not (tmp_path / "gates.png").exists()


def test_decode_reports_the_bytes_of_the_cache_it_filled():
    spec = ft.load_spec("quickstart")
    found = measure_decode(ft.build(spec), prompt=10, steps=8)
    assert found.cache_bytes == ft.build(spec, device="meta").new_cache(1, 18).nbytes
    assert found.tokens_per_second > 0
