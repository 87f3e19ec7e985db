"""The files of a run: records that are cut and go on, a directory with one owner, a lock, all-or-nothing files."""

import json

import pytest
import training_runs as runs

from fusiontree.files import read_json, write_json
from fusiontree.training import RunError
from fusiontree.training.metrics import Metrics, latest, read
from fusiontree.training.output import Output


def test_records_beyond_the_resumed_step_are_cut(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.start(0)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": step / 3})
    with metrics.path.open("a") as file:
        file.write('{"step": 6, "lo')  # the kill came here
    metrics.start(3)
    metrics.write({"step": 4, "loss": 9.0})
    assert [record["step"] for record in read(metrics.path)] == [1, 2, 3, 4]
    assert latest(read(metrics.path), "loss") == 9.0
    assert read(metrics.path)[0]["loss"] == 1 / 3


def test_tensorboard_gets_every_number_and_forgets_what_was_cut(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):
        metrics = Metrics(tmp_path, tensorboard=True)
        metrics.start(start)
        for step in range(start + 1, start + 4):
            gates = {"layers.0.mixer.gate": {"mamba": {"mean": 0.5 + start}}}
            metrics.write({"step": step, "loss": float(step + start), "gates": gates})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "gates/layers.0.mixer.gate/mamba/mean"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 5), (4, 6), (5, 7)]


def test_a_directory_has_one_owner_at_a_time(data, tmp_path):
    output, again = (Output(runs.spec(data, tmp_path / "out")) for _ in range(2))
    with output.claimed(), pytest.raises(RunError, match="another process is training there"), again.claimed():
        pass
    assert not output.root.exists(), "neither run began"
    with again.claimed():
        again.begin()
    assert again.run.exists()


def test_a_run_that_could_not_write_its_model_in_the_end_does_not_begin(data, tmp_path):
    output = Output(runs.spec(data, tmp_path))
    output.begin()
    (tmp_path / "model").mkdir()
    output.check()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="model: exists and is not a model of ours; choose another output"):
        output.check()


def test_a_directory_with_results_of_nobody_knows_whom_is_refused(data, tmp_path):
    output = Output(runs.spec(data, tmp_path))
    output.check()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match=r"has results but no run\.yaml"):
        output.check()
    (tmp_path / "run.yaml").write_text("training: [")
    with pytest.raises(RunError, match=r"belongs to a run that cannot be read .*run\.yaml"):
        output.check()


def test_the_run_file_of_a_user_is_left_as_it_is(data, tmp_path):
    text = json.dumps(data, indent=3)
    (tmp_path / "run.yaml").write_text(text)
    output = Output(runs.spec(data, tmp_path))
    output.check()
    with output.claimed():
        pass
    assert (tmp_path / "run.yaml").read_text() == text


def test_a_directory_that_cannot_be_is_one_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is not a directory"):
        Output(runs.spec(data, tmp_path / "file")).check()
    with pytest.raises(RunError, match="cannot be written"), Output(runs.spec(data, tmp_path / "file" / "x")).claimed():
        pass


def test_what_is_not_json_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"a": 0.1})
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 0.1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
