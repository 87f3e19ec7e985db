"""What can go wrong around a run: each is one line and the right exit code, and costs nothing that was there."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import training_runs as runs

from fusiontree import files, load
from fusiontree.core.model import memory
from fusiontree.data.contents import Contents
from fusiontree.recipes.train import main, run
from fusiontree.training import RunError, TrainingFailed, checkpoint
from fusiontree.training.console import Console
from fusiontree.training.titan.data import refuse_changed

FIRST = "step-00000016"


@pytest.fixture
def unfinished(one, data, tmp_path) -> tuple[Path, Path]:
    """A run that was stopped behind its last checkpoint: its file and its directory."""
    directory = tmp_path / "out"
    shutil.copytree(one, directory)
    shutil.rmtree(directory / "model")
    shutil.rmtree(directory / "checkpoints" / "step-00000020")
    return runs.write_run(tmp_path / "run.json", data | {"output": str(directory)}), directory


def refused(file: Path, capsys, *overrides: str, code: int = 2) -> str:
    """What a command says that fails."""
    capsys.readouterr()
    assert main([str(file), *overrides]) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def test_a_run_that_cannot_start_leaves_nothing_and_can_be_corrected(data, tmp_path, capsys):
    source = data["data"]["source"]
    wrong = data | {"data": data["data"] | {"source": source | {"train": "typo.jsonl"}}}
    said = refused(runs.write_run(tmp_path / "run.json", wrong | {"output": str(tmp_path / "out")}), capsys)
    assert "typo.jsonl: cannot be read" in said
    assert not (tmp_path / "out").exists()
    right = runs.spec(data | {"validation": None}, tmp_path / "out", "training.steps=1")
    assert run(right).status == "finished"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("state.json", "", ["state.json: cannot be read (JSONDecodeError", "remove that directory"]),
        ("state.json", "{}", ["state.json: cannot be read (KeyError", "remove that directory"]),
        ("state.json", None, ["state.json: cannot be read (FileNotFoundError", "remove that directory"]),
        ("shard-00001-model-00001-of-00001.safetensors", "", [FIRST, "header", "remove that directory"]),
    ],
)
def test_a_broken_checkpoint(unfinished, capsys, name, content, parts):
    file, directory = unfinished
    path = directory / "checkpoints" / FIRST / name
    path.unlink() if content is None else path.write_text(content)
    said = refused(file, capsys)
    assert all(part in said for part in parts), said
    assert "Traceback" not in said
    path.unlink(missing_ok=True)


def test_data_that_changed_since_the_checkpoint_is_named(data, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held_out")}
    for file in files.values():
        runs.write_corpus(file)
    source = {"kind": "jsonl"} | {name: str(file) for name, file in files.items()}
    short = {"training": data["training"] | {"steps": 2}, "checkpoint": {"every": 1}, "validation": {"every": 2}}
    changed = data | short | {"data": data["data"] | {"source": source}, "output": str(tmp_path / "out")}
    run_file = runs.write_run(tmp_path / "run.json", changed)
    assert main([str(run_file)]) == 0
    whole = {path: path.read_bytes() for path in (tmp_path / "out" / "checkpoints" / "step-00000001").iterdir()}
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000002")
    shutil.rmtree(tmp_path / "out" / "model")
    for file in files.values():
        before = file.read_bytes()
        file.write_bytes(before + b'{"text": "more"}\n')
        said = refused(run_file, capsys)
        assert f"{file}: was read as 80 documents" in said and "is now 81 documents" in said, said
        file.write_bytes(before)
    assert {path: path.read_bytes() for path in whole} == whole
    assert main([str(run_file), "validation.bytes=100"]) == 0, "to measure on less is no other data"


def test_a_checkpoint_of_before_data_was_recorded_is_taken(caplog):
    refuse_changed(Contents(), None)
    assert "does not say what the data was" in caplog.text


@pytest.mark.parametrize("line", [b"garbage\n", b"[1]\n", b"\xff\n"])
def test_broken_metrics(unfinished, capsys, line):
    file, directory = unfinished
    with (directory / "metrics.jsonl").open("ab") as metrics:
        metrics.write(line)
    assert "metrics.jsonl: line 21 is not a record" in refused(file, capsys)


def test_a_model_that_is_gone_is_written_again(one, data, tmp_path):
    shutil.copytree(one, tmp_path / "out")
    (tmp_path / "out" / "model" / "model.safetensors").unlink()
    (tmp_path / "out" / "model" / "spec.yaml").unlink()
    assert run(runs.spec(data, tmp_path / "out")).status == "finished"
    mine, theirs = load(tmp_path / "out" / "model").state_dict(), load(one / "model").state_dict()
    assert all((mine[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize("override", ["model.width=2000000", "data.length=2147483647", "training.rows=2147483644"])
def test_what_cannot_fit_is_refused_before_it_is_allocated(data, tmp_path, capsys, override):
    file = runs.write_run(tmp_path / "run.json", data | {"output": str(tmp_path / "out")})
    assert "bytes do not fit on cpu" in refused(file, capsys, override, "model.encodings.time.max_length=2147483647")
    assert not (tmp_path / "out").exists()


def test_room_is_asked_for_all_that_training_keeps(data, tmp_path, monkeypatch):
    spec = runs.spec(data, tmp_path / "out", "training.steps=1")
    asked = {}
    monkeypatch.setattr(memory, "check_room", lambda needed, device, *, what="weights": asked.setdefault(what, needed))
    run(spec)
    parameters = sum(p.numel() for p in load(tmp_path / "out" / "model").parameters())
    assert asked["model: training it"] == 16 * parameters


class TestFullDisk:
    """The operating system's error, raised where files are written."""

    @pytest.fixture
    def full(self, monkeypatch):
        """From now on there is no room for a byte."""

        def nothing(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", nothing)
        monkeypatch.setattr(checkpoint, "save", nothing)

    def test_a_checkpoint_that_cannot_be_written(self, data, tmp_path, monkeypatch, capsys):
        def nothing(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoint, "save", nothing)
        with pytest.raises(TrainingFailed, match="step-00000008: cannot be written: OSError: No space left on device"):
            run(runs.spec(data, tmp_path / "out"))
        assert list((tmp_path / "out" / "checkpoints").iterdir()) == []
        monkeypatch.undo()
        assert run(runs.spec(data, tmp_path / "out")).status == "finished"

    def test_the_first_file_that_cannot_be_written(self, data, tmp_path, full, capsys):
        file = runs.write_run(tmp_path / "run.json", data | {"output": str(tmp_path / "out")})
        assert "No space left on device" in refused(file, capsys, code=1)
        assert not list(tmp_path.rglob("*.partial"))

    def test_a_file_is_replaced_or_left_alone(self, tmp_path, full):
        (tmp_path / "a").write_text("old")
        with pytest.raises(OSError, match="No space left on device") as raised:
            files.write_text(tmp_path / "a", "new")
        assert raised.value.filename == str(tmp_path / "a")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_two_processes_and_a_directory_in_use(data, tmp_path):
    import fcntl

    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    file = runs.write_run(tmp_path / "run.json", data | {"output": str(out)})
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runs.start(runs.command(file, processes=2), log).wait() == 1
    text = log.read_text()
    assert text.count("another process is training there") == 1
    assert "gloo" not in text and 'titan/train.py"' not in text


def test_nobody_reads_the_progress(monkeypatch, capsys):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Closed())
    told = Console()
    told.message("one")
    told.message("two")
    assert sys.stdout.name == os.devnull


def test_how_often_a_run_says_something_is_not_what_it_is(unfinished):
    file, directory = unfinished
    asides = ("log.every=5", "tensorboard=true", "checkpoint.every=3", "validation=null")
    assert main([str(file), *asides]) == 0
    assert sorted(os.listdir(directory / "checkpoints"))[-1] == "step-00000020"


def test_the_last_step_is_recorded_whatever_its_number(data, tmp_path):
    run(runs.spec(data, tmp_path / "out", "training.steps=3", "log.every=2", "validation=null"))
    found = runs.metrics.read(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in found if "loss" in record] == [1, 2, 3]


def test_no_output_means_the_folder_of_the_run_file(data, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    file = runs.write_run(tmp_path / "mine" / "a.json", data | {"output": "elsewhere"})
    monkeypatch.chdir(tmp_path)
    assert main([str(file), "training.steps=1", "output=null", "validation=null"]) == 0
    assert (tmp_path / "mine" / "model").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_made_in_python_is_found_again_from_anywhere(data, tmp_path, monkeypatch):
    source = data["data"]["source"]
    shutil.copy(source["train"], tmp_path / "text.jsonl")
    near = data | {"data": data["data"] | {"source": source | {"train": "text.jsonl"}}}
    monkeypatch.chdir(tmp_path)
    run(runs.spec(near, Path("out"), "training.steps=1", "validation=null"))
    monkeypatch.chdir("/")
    assert main([str(tmp_path / "out" / "run.yaml"), f"output={tmp_path / 'again'}"]) == 0
    with pytest.raises(RunError, match="belongs to another run"):
        run(runs.spec(near, tmp_path / "out"))
