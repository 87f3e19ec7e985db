"""What `auto` comes to: by the machine, in every process alike, and kept by a run that goes on elsewhere."""

import json
import shutil

import pytest
import torch
import training_runs as runs

from fusiontree import machine
from fusiontree.core.spec import yaml
from fusiontree.errors import SpecError
from fusiontree.recipes.train import run
from fusiontree.training import RunError, RunSpec
from fusiontree.training.output import Output
from fusiontree.training.parallel import world
from fusiontree.training.resolve import LONG, compiles, resolved
from fusiontree.training.sections import ResolvedSpec


@pytest.fixture
def one_process():
    with world():
        yield


def on_a_machine(monkeypatch, *, units, device="cpu", compiler=True):
    monkeypatch.setattr(machine, "multiplies", lambda dtype: units or dtype not in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(machine, "device_type", lambda: device)
    monkeypatch.setattr(machine, "compile_refusal", lambda device: None if compiler else "there is no C++ compiler")


@pytest.mark.parametrize(
    ("asked", "began", "units", "device", "found"),
    [
        ("auto", None, False, "cpu", "float32 (the processor has no units for bfloat16)"),
        ("auto", None, True, "cpu", "bfloat16 (the processor has units for it)"),
        ("auto", None, False, "cuda", "bfloat16 (on a GPU)"),
        ("auto", "bfloat16", False, "cpu", "bfloat16 (as the run began)"),
        ("auto", "float32", True, "cuda", "float32 (as the run began)"),
        ("bfloat16", None, False, "cpu", "bfloat16 (as the run says)"),
        ("float32", "float32", True, "cuda", "float32 (as the run says)"),
    ],
)
def test_precision_is_the_machines_the_runs_or_the_first_ones(
    one_process, data, tmp_path, monkeypatch, asked, began, units, device, found
):
    on_a_machine(monkeypatch, units=units, device=device)
    asked_run = runs.spec(data, tmp_path, f"training.precision={asked}")
    decided, choice = resolved(asked_run, ResolvedSpec(precision=began) if began else None)
    assert str(choice) == found
    assert decided.resolved == ResolvedSpec(precision=found.split()[0])
    assert decided.training.precision == asked
    assert decided.digest() == asked_run.digest()


@pytest.mark.parametrize(
    ("asked", "steps", "units", "device", "compiler", "found"),
    [
        ("auto", 10**6, False, "cpu", True, "false (it gains nothing on a processor without units for bfloat16)"),
        ("auto", LONG - 1, True, "cpu", True, f"false (it pays from {LONG} steps on)"),
        ("auto", LONG, True, "cpu", True, "true (in the first step, which takes a minute or more)"),
        ("auto", LONG, True, "cpu", False, "false (there is no C++ compiler)"),
        ("auto", 1, False, "cuda", True, "true (in the first step, which takes a minute or more)"),
        ("false", LONG, True, "cpu", True, "false (as the run says)"),
        ("true", 1, False, "cpu", True, "true (in the first step, which takes a minute or more)"),
    ],
)
def test_layers_are_compiled_where_it_pays(data, tmp_path, monkeypatch, asked, steps, units, device, compiler, found):
    on_a_machine(monkeypatch, units=units, device=device, compiler=compiler)
    asked_run = runs.spec(data, tmp_path, f"training.compile={asked}", f"training.steps={steps}")
    assert str(compiles(asked_run)) == found


def test_without_a_compiler_a_run_that_asks_for_one_is_refused(data, tmp_path, monkeypatch):
    on_a_machine(monkeypatch, units=True, compiler=False)
    with pytest.raises(RunError, match=r"training\.compile: found true, nothing can be compiled here \(there is no C"):
        compiles(runs.spec(data, tmp_path, "training.compile=true"))


def test_a_run_keeps_its_precision_on_another_machine(data, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for directory in (whole, cut):
        on_a_machine(monkeypatch, units=True)
        run(runs.spec(data, directory, "training.precision=auto", "training.steps=2", "validation=null"))
    assert RunSpec.from_file(cut / "run.yaml").resolved == ResolvedSpec(precision="bfloat16")
    assert "precision: auto" in (cut / "run.yaml").read_text()
    shutil.rmtree(cut / "model")
    on_a_machine(monkeypatch, units=False)
    capsys.readouterr()
    run(runs.spec(data, cut, "training.precision=auto", "training.steps=2", "validation=null"))
    assert "precision bfloat16 (as the run began)" in capsys.readouterr().out
    again = RunSpec.from_file(whole / "run.yaml", [f"output={tmp_path / 'again'}"])
    run(again)
    assert "precision bfloat16 (as the run began)" in capsys.readouterr().out


def test_a_precision_that_contradicts_the_run_is_refused(data, tmp_path):
    auto = ["training.precision=auto", "training.steps=2", "validation=null"]
    run(runs.spec(data, tmp_path, *auto, "resolved={precision: float32}"))
    with pytest.raises(RunError, match=r"resolved\.precision is bfloat16 here, and the run there began in float32$"):
        run(runs.spec(data, tmp_path, *auto, "resolved={precision: bfloat16}"))
    with pytest.raises(SpecError, match=r"^resolved\.precision: training\.precision is float32, found bfloat16"):
        runs.spec(data, tmp_path, "training.precision=float32", "resolved={precision: bfloat16}")


def test_a_run_whose_precision_nobody_noted_is_not_guessed(data, tmp_path):
    auto = ["training.precision=auto", "training.steps=2", "validation=null"]
    run(runs.spec(data, tmp_path, *auto, "resolved={precision: float32}"))
    shutil.rmtree(tmp_path / "model")
    text = (tmp_path / "run.yaml").read_text()
    section = yaml.write({"resolved": {"precision": "float32"}})
    assert section in text
    (tmp_path / "run.yaml").write_text(text.replace(section, "resolved: null\n"))
    with pytest.raises(RunError, match=r"run\.yaml: training\.precision is auto, and nothing says .* add resolved"):
        run(runs.spec(data, tmp_path, *auto))
    run(runs.spec(data, tmp_path, *auto, "resolved={precision: float32}"))
    assert (tmp_path / "run.yaml").read_text() == text


def test_a_run_file_beside_its_results_notes_what_auto_came_to(data, tmp_path, monkeypatch):
    """Results go to the folder of the run file where it names no output; that file has to note the precision."""
    file, text = tmp_path / "run.yaml", "# mine\n" + yaml.write(unsettled(data, tmp_path))
    file.write_text(text)
    on_a_machine(monkeypatch, units=False)
    run(RunSpec.from_file(file))
    written = file.read_text()
    assert written.startswith(text.rstrip())
    assert RunSpec.from_file(file).resolved == ResolvedSpec(precision="float32")
    shutil.rmtree(tmp_path / "model")
    on_a_machine(monkeypatch, units=True)
    run(RunSpec.from_file(file))
    assert file.read_text() == written


@pytest.mark.parametrize("form", [json.dumps, lambda given: yaml.write(given | {"resolved": None})])
def test_a_run_file_that_no_section_can_follow_is_written_anew(data, tmp_path, form):
    (tmp_path / "run.yaml").write_text(form(unsettled(data, tmp_path)))
    mine = RunSpec.from_file(tmp_path / "run.yaml")
    noted = mine.model_copy(update={"resolved": ResolvedSpec(precision="float32")})
    Output(noted).begin()
    assert RunSpec.from_file(tmp_path / "run.yaml") == noted


def unsettled(data, tmp_path):
    """The data of a run file that says neither its output nor what `auto` came to."""
    given = runs.spec(data, tmp_path, "training.precision=auto", "training.steps=2", "validation=null").data()
    return {key: value for key, value in given.items() if key not in ("output", "resolved")}
