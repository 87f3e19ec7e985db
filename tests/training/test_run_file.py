"""Run files: what they resolve to, how they are edited, what is refused and how."""

import json

import pytest
import training_runs as runs
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree import build, load_spec, save
from fusiontree.errors import FusionTreeError, SpecError
from fusiontree.recipes.train import load_run, recipes
from fusiontree.training import RunSpec

MINIMAL = {
    "model": "quickstart",
    "data": {"source": {"kind": "stdlib"}, "length": 512},
    "training": {"steps": 10, "rows": 8},
    "optimizer": {"learning_rate": 0.003},
}


def minimal(**more) -> RunSpec:
    return RunSpec.parse(MINIMAL | more)


def test_a_model_is_a_name_a_path_from_the_file_or_a_spec(tmp_path):
    spec = load_spec("quickstart")
    (tmp_path / "mine.yaml").write_text(spec.to_yaml())
    for model in ("quickstart", "mine.yaml", spec.data()):
        assert RunSpec.from_file(runs.write_run(tmp_path / "run.json", MINIMAL | {"model": model})).model == spec


def test_paths_of_data_are_taken_from_the_file_and_those_of_edits_from_here(tmp_path, monkeypatch):
    below, here = tmp_path / "below", tmp_path / "here"
    below.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    data = {"source": {"kind": "jsonl", "train": "a.jsonl"}, "length": 8}
    file = runs.write_run(below / "run.json", MINIMAL | {"data": data})
    assert RunSpec.from_file(file).data()["data"]["source"]["train"] == str(below / "a.jsonl")
    edited = RunSpec.from_file(file, ["data.source.train=b.jsonl"])
    assert edited.data()["data"]["source"]["train"] == str(here / "b.jsonl")


def test_results_go_beside_the_file_unless_it_says_where(tmp_path):
    file = runs.write_run(tmp_path / "run.json", MINIMAL)
    assert RunSpec.from_file(file).directory == tmp_path
    assert RunSpec.from_file(file, ["output=elsewhere"]).directory.name == "elsewhere"
    with pytest.raises(FusionTreeError, match="output: expected a directory"):
        _ = minimal().directory


def test_the_written_file_is_the_same_run(tmp_path):
    run = minimal(objectives={"balance": 0.5}, validation={"every": 3}, output=str(tmp_path))
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    again = RunSpec.from_file(tmp_path / "run.yaml")
    assert again == run
    assert again.digest() == run.digest()
    assert "output" not in run.to_yaml()


@settings(deadline=None)
@given(
    st.sampled_from(
        [
            ("training.steps", 11),
            ("optimizer.betas", [0.8, 0.9]),
            ("data.length", 64),
            ("seed", 7),
            ("monitor.every", 3),
            ("parallelism.shard", 2),
            ("objectives", {"entropy": 0.5}),
            ("model.width", 256),
            ("model.layers.*.mixer.gate.granularity", "token"),
        ]
    )
)
def test_every_edit_is_another_run(edit):
    path, value = edit
    edits = [f"{path}={json.dumps(value)}"]
    if value == "token":
        edits.append("model.layers.*.mixer.gate.rank=null")
    run, edited = minimal(), minimal().override(edits)
    assert edited.digest() != run.digest()
    assert path.replace("*", "0").split(".")[0] in (edited.difference(run) or "")
    assert run.difference(minimal(output="anywhere")) is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("training.step=2", "training.step: matches nothing; the nearest is 'training.steps'"),
        ("training.steps=0", "training.steps: expected a number greater than or equal to 1, found 0"),
        ("training.steps=1e3", "training.steps: expected an integer, found 1000.0"),
        ("training.rows", "'training.rows': an override is path=value"),
        ("training.rows=[", "training.rows: YAML: line 1"),
        ("training.microbatch_rows=3", "training.microbatch_rows: expected a divisor of the 8 rows of a step, found 3"),
        ("model=quickstrat", "model: quickstrat: neither a file nor a preset, did you mean 'quickstart'?"),
        ("model.layers.*.mixer.gate.rnk=1", "model: layers.*.mixer.gate.rnk: matches nothing; the nearest is"),
        ("model.vocab_size=200", "model.vocab_size: the data's tokens need 257, found 200"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate: expected a number greater than 0, found -1"),
        ("optimizer.minimum=1.5", "optimizer.minimum: expected a number less than or equal to 1, found 1.5"),
        (
            "objectives.ballance=1",
            "objectives.ballance.kind: no objective is called 'ballance', did you mean 'balance'?",
        ),
        ("objectives.balance=-1", "objectives.balance.weight: expected a number greater than or equal to 0, found -1"),
        ("objectives.balance=true", "objectives.balance: expected a weight (a number) or a mapping, found True"),
        ("objectives.balance=x", "objectives.balance: expected a weight (a number) or a mapping, found 'x'"),
        ("objectives.cross_entropy=0", "objectives: one at least needs a weight above 0, found 0 for all"),
        (
            "objectives.cross_entropy={kind: balance}",
            "objectives.cross_entropy.kind: the name of a kind stands for that kind alone, found 'balance'",
        ),
        ("losses.balance=1", "losses: unknown key; it is called objectives"),
        ("parallelism.shard=0", "parallelism.shard"),
        ("format=2", "format: expected 1, found 2"),
        ("tokenizer=3", "tokenizer: matches nothing; known here: format, model, data, training"),
        ("width=3", "width: a run has none; its model has: model.width"),
        ("validation.every=3", "validation.every: matches nothing; validation is null"),
    ],
)
def test_a_bad_edit_is_one_line_with_its_path(edit, message):
    with pytest.raises(SpecError) as caught:
        minimal().override([edit])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_saved_model_is_no_model_of_a_run_and_its_spec_is(tmp_path, monkeypatch):
    """Its weights would be passed over in silence."""
    monkeypatch.chdir(tmp_path)
    small = load_spec("quickstart").replace({"layers": []})
    save(build(small), "a/model")
    runs.write_run(tmp_path / "a" / "run.yaml", MINIMAL)
    line = r"model: a/model is a saved model.*never from those there.*give a/model/spec.yaml.*train a/run.yaml.*Python"
    with pytest.raises(SpecError, match=line):
        load_run("quickstart", ["model=a/model"])
    with pytest.raises(SpecError, match=r"run.yaml: model: .*a/model is a saved model"):
        load_run(runs.write_run(tmp_path / "run.yaml", MINIMAL | {"model": "a/model"}))
    assert load_run("quickstart", ["model=a/model/spec.yaml"]).model == small


def test_the_directory_of_a_run_names_its_file(tmp_path):
    runs.write_run(tmp_path / "run.yaml", MINIMAL)
    with pytest.raises(FusionTreeError, match=r"neither a run file nor a recipe; did you mean .*run.yaml\?"):
        load_run(tmp_path)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch, empty):
    runs.write_run(tmp_path / "run.yaml", MINIMAL)
    save(build(load_spec("quickstart").replace({"width": 32}), device="cpu"), tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(FusionTreeError, match=f"^expected the name of a run file or recipe, found {empty!r}$"):
        load_run(empty)
    with pytest.raises(FusionTreeError, match=f"^expected the name of a preset or file, found {empty!r}$"):
        load_spec(empty)


def test_unknown_keys_name_the_file_and_the_nearest(tmp_path):
    file = runs.write_run(tmp_path / "run.json", MINIMAL | {"trainnig": {}})
    with pytest.raises(SpecError, match=r"run\.json: trainnig: unknown key, did you mean 'training'"):
        RunSpec.from_file(file)


def test_a_loss_on_gates_needs_a_gate():
    plain = {"vocab_size": 257, "width": 16, "layers": [{"ffn": {"kind": "swiglu", "hidden": 24}}]}
    with pytest.raises(SpecError, match=r"objectives\.entropy: it is of gates, and the model has none"):
        minimal(model=plain, objectives={"entropy": 0.1})


def test_objectives_in_short_and_in_full_are_the_same():
    short = minimal(objectives={"balance": 0.1})
    full = {"cross_entropy": {"kind": "cross_entropy"}, "balance": {"kind": "balance", "weight": 0.1}}
    assert short == minimal(objectives=full)
    named = minimal(objectives={"cross_entropy": 0, "even": {"kind": "balance"}})
    assert {name: (o.kind, o.weight) for name, o in named.objectives.items()} == {
        "cross_entropy": ("cross_entropy", 0.0),
        "even": ("balance", 1.0),
    }


def test_the_old_name_of_objectives_says_the_new_one():
    with pytest.raises(SpecError, match=r"losses: unknown key; it is called objectives"):
        minimal(losses={"balance": 0.1})


def test_every_recipe_is_a_valid_run():
    assert recipes()
    for name in recipes():
        assert load_run(name, ["training.steps=3"]).training.steps == 3
    with pytest.raises(FusionTreeError, match="neither a run file nor a recipe, did you mean 'quickstart'"):
        load_run("quickstar")
