"""Policies: what they drop, what they refuse, and that plans are files that fit one model."""

import json

import pytest
import torch

import fusiontree as ft
from fusiontree.core.probes.gate_statistics import GateStatistics
from fusiontree.errors import SpecError
from fusiontree.pruning import (
    Evidence,
    Plan,
    PruneError,
    Threshold,
    TopK,
    apply,
    droppable,
    plan,
    plan_by_hand,
    simplify_spec,
    verify,
)

torch.set_num_threads(1)
BRANCH = {"kind": "mlp", "hidden": 8}
NESTED = {"kind": "gated", "branches": {"x": BRANCH, "y": BRANCH}, "gate": {"kind": "sigmoid"}}


def layer(**branches):
    return {"mixer": {"kind": "gated", "branches": branches, "gate": {"kind": "softmax", "granularity": "token"}}}


@pytest.fixture(scope="module")
def spec():
    """Two layers of two branches, one of three with one of them a fusion."""
    two, three = layer(a=BRANCH, b=BRANCH), layer(a=BRANCH, b=BRANCH, c=NESTED)
    return ft.ModelSpec.model_validate({"vocab_size": 11, "width": 16, "layers": [two, two, three]})


OTHERS = {"std": 0.0, "histogram": [1.0], "entropy": 0.5, "saturated": 0.0, "count": 10}


def evidence(spec, means, steps=1000):
    """Statistics with these means by gate path."""
    full = {
        path: {name: GateStatistics.parse(OTHERS | {"mean": mean}).data() for name, mean in values.items()}
        for path, values in means.items()
    }
    return Evidence.model_validate({"steps_seen": steps, "spec": spec.digest(), "gates": full})


MEANS = {
    "layers.0.mixer.gate": {"a": 0.9, "b": 0.1},
    "layers.1.mixer.gate": {"a": 0.5, "b": 0.5},
    "layers.2.mixer.gate": {"a": 0.15, "b": 0.25, "c": 0.6},
    "layers.2.mixer.branches.c.gate": {"x": 0.19, "y": 0.81},
}


def test_threshold_is_the_origins_rule(spec):
    made = plan(spec, evidence(spec, MEANS), Threshold())
    assert made.drops == (
        "layers.0.mixer.branches.b",
        "layers.2.mixer.branches.a",
        "layers.2.mixer.branches.c.branches.x",
    )
    assert [d.path for d in made.decisions if d.drop] == list(made.drops)


def test_threshold_keeps_means_on_the_line(spec):
    means = {"layers.0.mixer.gate": {"a": 0.8, "b": 0.2}}
    assert plan(spec, evidence(spec, means), Threshold()).drops == ()


def test_threshold_wants_enough_steps(spec):
    with pytest.raises(PruneError, match="seen for 499 steps, min_steps is 500"):
        plan(spec, evidence(spec, MEANS, steps=499), Threshold())
    assert plan(spec, evidence(spec, MEANS, steps=500), Threshold()).drops


def test_threshold_never_drops_a_whole_fusion(spec):
    means = {"layers.2.mixer.gate": {"a": 0.1, "b": 0.15, "c": 0.05}}
    assert set(plan(spec, evidence(spec, means), Threshold()).drops) == {
        "layers.2.mixer.branches.a",
        "layers.2.mixer.branches.c",
    }


def test_topk_drops_the_smallest_but_never_the_last(spec):
    made = plan(spec, evidence(spec, MEANS), TopK(count=4))
    assert set(made.drops) == {
        "layers.0.mixer.branches.b",
        "layers.2.mixer.branches.a",
        "layers.2.mixer.branches.c.branches.x",
        "layers.2.mixer.branches.b",
    }
    with pytest.raises(PruneError, match=r"6 branches to drop, at most 5 can go"):
        plan(spec, evidence(spec, MEANS), TopK(count=6))


def test_evidence_of_another_model_is_refused(spec):
    other = spec.replace({"vocab_size": 12})
    with pytest.raises(PruneError, match=f"seen on the spec {spec.digest()}, this one is {other.digest()}"):
        plan(other, evidence(spec, MEANS), Threshold())


SWIGLU = {"kind": "swiglu", "hidden": 8}
"""Whose map `gate` is no gate."""


def test_evidence_of_what_is_no_gate_is_refused():
    parts = {"a": SWIGLU, "b": {"kind": "mlp", "hidden": 8}}
    layer = {"mixer": {"kind": "gated", "branches": parts, "gate": {"kind": "sigmoid"}}, "ffn": SWIGLU}
    plain = ft.ModelSpec.parse(
        {"vocab_size": 5, "width": 8, "layers": [layer, {"mixer": {"kind": "sum", "branches": parts}}]}
    )
    assert [path for path, _ in plain.gates()] == ["layers.0.mixer.gate"]
    for path in ("layers.0.ffn.gate", "layers.0.mixer.branches.a.gate", "layers.1.mixer.gate"):
        with pytest.raises(PruneError, match=rf"{path}: no gate is there, did you mean 'layers.0.mixer.gate'"):
            plan(plain, evidence(plain, {path: {"a": 0.1, "b": 0.9}}), Threshold())


def test_evidence_of_an_unknown_branch_is_refused(spec):
    with pytest.raises(PruneError, match=r"layers\.0\.mixer\.gate: no branch is called 'z' \(known: a, b\)"):
        plan(spec, evidence(spec, {"layers.0.mixer.gate": {"a": 0.1, "z": 0.9}}), Threshold())


def test_a_link_that_is_called_branches_is_none():
    """A path is not taken apart by the words in it."""
    inner = {"kind": "sum", "branches": {"a": {"kind": "mlp", "hidden": 8}, "b": {"kind": "mlp", "hidden": 8}}}
    chain = {"kind": "chain", "links": {"branches": inner | {"mlp": {"kind": "mlp", "hidden": 8}}}}
    spec = ft.ModelSpec.parse({"vocab_size": 5, "width": 8, "layers": [{"mixer": chain}]})
    here = "layers.0.mixer.links.branches"
    assert droppable(spec) == ["layers.0", "layers.0.mixer", f"{here}.branches.a", f"{here}.branches.b"]
    with pytest.raises(PruneError, match="nothing there can be dropped"):
        plan_by_hand(spec, [f"{here}.mlp"])


def test_a_pyramid_stays_one_as_a_branch_leaves_every_layer():
    period = [layer(a=BRANCH, b=BRANCH)]
    pyramid = {"repeat": 3, "layers": period, "vary": {"0.mixer.branches.a.hidden": [4, 8, 16]}}
    spec = ft.ModelSpec.parse({"vocab_size": 5, "width": 8, "layers": [pyramid]})
    left = plan_by_hand(spec, [f"layers.{n}.mixer.branches.b" for n in range(3)]).edit(spec)
    (repeat,) = left.layers
    assert dict(repeat.vary) == {"0.mixer.branches.a.hidden": (4, 8, 16)}
    assert left == ft.ModelSpec.parse(left.expand().data())


def test_evidence_of_an_unknown_gate_is_refused(spec):
    with pytest.raises(PruneError, match=r"layers\.9\.mixer\.gate: no gate is there"):
        plan(spec, evidence(spec, {"layers.9.mixer.gate": {"a": 1.0}}), Threshold())


def test_a_plan_is_a_file_for_one_model(spec, tmp_path):
    made = plan(spec, evidence(spec, MEANS), Threshold())
    file = tmp_path / "plan.json"
    file.write_text(made.to_json())
    assert Plan.from_file(file) == made
    pruned = made.edit(spec)
    with pytest.raises(PruneError, match="made for the spec"):
        made.edit(pruned)
    assert pruned.lineage[-1].parent == spec.digest()


def test_broken_plan_files_name_what_is_wrong(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"format": 1, "spec": "x", "drop": []}))
    with pytest.raises(SpecError, match=r"plan\.json: drop: unknown key, did you mean 'drops'"):
        Plan.from_file(file)


@pytest.mark.parametrize(
    ("drops", "message"),
    [
        (["layers.0.mixer.branches.z"], r"layers\.0\.mixer\.branches\.z: nothing there.*did you mean"),
        (["layers.0.mixer.branches.a", "layers.0.mixer.branches.b"], "last branch; drop the fusion itself"),
        (["layers.0.mixer.gate"], "nothing there can be dropped"),
        (["layers.7"], "nothing there can be dropped"),
    ],
)
def test_impossible_drops_are_refused(spec, drops, message):
    with pytest.raises(PruneError, match=message):
        plan_by_hand(spec, drops)


def test_paths_stay_and_empty_layers_stay(spec):
    made = plan_by_hand(spec, ["layers.1", "layers.2.mixer.branches.c.branches.x"])
    pruned = made.edit(spec)
    assert [path for path, _ in pruned.nodes()] == [
        "layers.0.mixer",
        "layers.0.mixer.branches.a",
        "layers.0.mixer.branches.b",
        "layers.2.mixer",
        "layers.2.mixer.branches.a",
        "layers.2.mixer.branches.b",
        "layers.2.mixer.branches.c",
        "layers.2.mixer.branches.c.branches.y",
    ]
    assert pruned.expanded_layers()[1] == ft.LayerSpec()
    simple, moved = simplify_spec(pruned)
    assert moved == {"layers.2": "layers.1", "layers.2.mixer.branches.c.branches.y": "layers.1.mixer.branches.c"}
    assert "layers.1.mixer.branches.c" in dict(simple.nodes())


def test_verify_sees_a_changed_weight_and_a_foreign_spec(spec):
    model = ft.build(spec)
    made = plan_by_hand(spec, ["layers.0.mixer.branches.b"])
    pruned = apply(model, made)
    assert "pruned equals dropped" in verify(model, pruned, made).text
    with torch.no_grad():
        pruned.layers[2].mixer.branches["a"].up.weight[0, 0] += 1e-3
    with pytest.raises(PruneError, match="is not the original's"):
        verify(model, pruned, made)
    with pytest.raises(PruneError, match="not what the plan makes"):
        verify(model, model, made)


def test_apply_leaves_the_original_alone(spec):
    model = ft.build(spec)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = apply(model, plan_by_hand(spec, ["layers.0.mixer.branches.b"]))
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_branch_may_be_called_mlp_but_a_fusions_mlp_is_no_branch():
    parts = {"kind": "sum", "branches": {"mlp": BRANCH, "other": BRANCH}, "mlp": BRANCH}
    spec = ft.ModelSpec.model_validate({"vocab_size": 11, "width": 16, "layers": [{"mixer": parts}]})
    assert droppable(spec) == [
        "layers.0",
        "layers.0.mixer",
        "layers.0.mixer.branches.mlp",
        "layers.0.mixer.branches.other",
    ]
    assert "layers.0.mixer.branches.mlp" not in dict(
        plan_by_hand(spec, ["layers.0.mixer.branches.mlp"]).edit(spec).nodes()
    )
