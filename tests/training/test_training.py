"""Whole runs on torchtitan's Trainer: what they write, that processes and cuts do not matter, that they resume."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from safetensors import safe_open

from fusiontree import load
from fusiontree.pruning import Evidence
from fusiontree.recipes.train import main, run
from fusiontree.training import RunError, RunSpec


class Interrupter:
    """A listener that sends this process a signal at a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number, self.messages = step, number, []

    def record(self, record, steps):
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)

    def message(self, text):
        self.messages.append(text)


def test_a_run_leaves_all_its_results(one):
    assert {path.name for path in one.iterdir()} >= {"run.yaml", "model", "gates.json", "metrics.jsonl", "train.log"}
    assert load(one / "model").spec == RunSpec.from_file(one / "run.yaml").model
    found = runs.metrics.read(one / "metrics.jsonl")
    keys = {"loss", "bits_per_byte", "tokens", "tokens_per_second", "memory", "learning_rate", "grad_norm"}
    assert [record["step"] for record in found] == list(range(1, runs.STEPS + 1))
    assert all(record.keys() >= keys for record in found)
    assert found[-1]["tokens"] == runs.STEPS * 4 * 32
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert [r["step"] for r in found if "validation_loss" in r] == [10, 20]
    assert [r["step"] for r in found if "gates" in r] == [3, 6, 9, 12, 15, 18, 20]


def test_only_the_newest_checkpoints_stay_and_none_holds_a_pickle(one, two):
    for directory in (one, two):
        assert sorted(os.listdir(directory / "checkpoints")) == ["step-00000016", "step-00000020"]
        for file in (path for path in (directory / "checkpoints").rglob("*") if path.is_file()):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    assert opened.keys()
            else:
                assert json.loads(file.read_text())["format"] == 2


def test_gate_statistics_are_evidence_for_pruning(one):
    evidence = Evidence.from_file(one / "gates.json")
    evidence.check(load(one / "model").spec)
    assert evidence.steps_seen == runs.STEPS
    assert list(evidence.gates) == ["layers.0.mixer.gate", "layers.1.mixer.gate"]
    # seven observations of all 4 * 32 tokens and 16 channels; a gate that reads nothing has one value a pass
    assert evidence.gates["layers.0.mixer.gate"]["mamba"].count == 7 * 4 * 32 * 16
    assert evidence.gates["layers.1.mixer.gate"]["mamba"].count == 7


def test_processes_and_micro_batches_do_not_change_a_run(one, two):
    torch.testing.assert_close(runs.losses(two), runs.losses(one), rtol=1e-5, atol=0)
    mine, theirs = load(one / "model").state_dict(), load(two / "model").state_dict()
    for path, weight in mine.items():
        torch.testing.assert_close(theirs[path], weight, rtol=1e-4, atol=1e-5, msg=path)
    gates = [json.loads((directory / "gates.json").read_text())["gates"] for directory in (one, two)]
    for path, branches in gates[0].items():
        for branch, statistics in branches.items():
            assert gates[1][path][branch]["mean"] == pytest.approx(statistics["mean"], rel=1e-5)


def test_micro_batches_alone_do_not_change_a_run(one, data, tmp_path):
    run(runs.spec(data, tmp_path / "out", "training.microbatch_rows=2"))
    torch.testing.assert_close(runs.losses(tmp_path / "out"), runs.losses(one), rtol=1e-5, atol=0)


def test_cross_entropy_of_weight_0_is_measured_only(one, data, tmp_path):
    run(runs.spec(data, tmp_path / "out", "training.steps=10", "objectives.cross_entropy=0"))
    found = runs.metrics.read(tmp_path / "out/metrics.jsonl")
    assert [record["objectives"]["cross_entropy"] for record in found] == [record["loss"] for record in found]
    assert found[-1]["loss"] == pytest.approx(found[0]["loss"], rel=0.02)
    assert runs.losses(one)[9] < 0.9 * found[-1]["loss"]


def test_bits_per_byte_are_those_of_each_document_by_itself(one, data):
    spec, model = RunSpec.from_file(one / "run.yaml"), load(one / "model")
    texts = [document.text for document in spec.text.documents("held_out")]
    stream = [(number, token) for number, text in enumerate(texts) for token in (*text, 256)]
    bits, length = 0.0, spec.text.length
    for start in range(0, len(stream), length):
        row = stream[start : start + length + 1]
        for document in sorted({number for number, _ in row}):
            piece = torch.tensor([[token for number, token in row if number == document]])
            reads = piece[:, :-1]
            if reads.numel():
                nats = F.cross_entropy(model(reads)[0].detach(), piece[0, 1:], reduction="sum")
                bits += float(nats) / math.log(2)
    expected = bits / sum(map(len, texts))
    found = runs.metrics.read(one / "metrics.jsonl")[-1]["validation_bits_per_byte"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_killed_run_goes_on_bit_by_bit(compiled, data, tmp_path):
    noisy = data | {"model": runs.hybrid({"kind": "hard_concrete", "granularity": "token"})}
    if compiled:  # objectives of gates would look at the plain layers
        noisy |= {"training": data["training"] | {"compile": True}, "objectives": {}}
    file, log, killed = runs.write_run(tmp_path / "run.json", noisy), tmp_path / "log", tmp_path / "killed"
    process = runs.start(runs.command(file, f"output={killed}"), log)
    runs.wait_for_step(process, killed, 11, log)
    runs.kill(process)
    assert os.listdir(killed / "checkpoints") == ["step-00000008"]
    assert not (killed / "model").exists()
    (killed / "checkpoints" / ".step-00000016.partial").mkdir()  # as if the kill had come while one was written
    assert main([str(file), f"output={killed}"]) == 0
    assert main([str(file), f"output={tmp_path / 'whole'}"]) == 0
    assert_equal_runs(killed, tmp_path / "whole")


def assert_equal_runs(one: Path, other: Path) -> None:
    for name in ("gates.json", "model/spec.yaml", "model/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert runs.records(one) == runs.records(other)
    names = [sorted(os.listdir(directory / "checkpoints")) for directory in (one, other)]
    assert names[0] == names[1] == ["step-00000016", "step-00000020"]
    for name in names[0]:
        mine, theirs = (runs.tensors(directory / "checkpoints" / name) for directory in (one, other))
        assert mine.keys() == theirs.keys()
        assert any("exp_avg_sq" in path for path in mine)
        assert all(torch.equal(tensor, theirs[path]) for path, tensor in mine.items())


def test_a_killed_run_of_two_processes_goes_on_bit_by_bit(two, data, tmp_path):
    file, log, killed = runs.write_run(tmp_path / "run.json", data), tmp_path / "log", tmp_path / "killed"
    arguments = runs.command(file, f"output={killed}", "training.microbatch_rows=1", processes=2)
    process = runs.start(arguments, log)
    runs.wait_for_step(process, killed, 11, log)
    runs.kill_workers(process)
    process = runs.start(arguments, log)
    assert process.wait() == 0, log.read_text()
    assert_equal_runs(killed, two)


def launched(file, processes, *overrides):
    """The command that starts several processes by itself."""
    return [sys.executable, "-m", "fusiontree.cli", "train", str(file), f"--processes={processes}", *overrides]


def test_processes_that_are_stopped_leave_our_line_as_the_last(data, tmp_path):
    file, log, out = runs.write_run(tmp_path / "run.json", data), tmp_path / "log", tmp_path / "out"
    process = runs.start(launched(file, 2, f"output={out}", "training.steps=1000"), log)
    runs.wait_for_step(process, out, 1, log)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert "run the same command again to go on" in log.read_text().splitlines()[-1]


def test_what_every_process_refuses_is_one_line(data, tmp_path):
    file, log = runs.write_run(tmp_path / "run.json", data), tmp_path / "log"
    process = runs.start(launched(file, 3, f"output={tmp_path / 'out'}"), log)
    assert process.wait() == 2
    message = "error: training.rows: expected a multiple of the 3 processes, found 4"
    assert log.read_text().splitlines() == [message]


def test_another_number_of_processes_can_go_on(two, data, tmp_path):
    """Shards that two processes wrote, read by one."""
    half = tmp_path / "half"
    shutil.copytree(two, half)
    shutil.rmtree(half / "model")
    shutil.rmtree(half / "checkpoints" / "step-00000020")
    result = run(RunSpec.from_file(half / "run.yaml").override(["training.microbatch_rows=1"]))
    assert (result.status, result.directory) == ("finished", half)
    torch.testing.assert_close(runs.losses(half), runs.losses(two), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_goes_on_as_if_nothing_had_been(one, data, tmp_path, number, code):
    listener = Interrupter(5, number)
    stopped = run(runs.spec(data, tmp_path / "out"), listener=listener)
    assert (stopped.status, stopped.steps, stopped.exit_code) == ("stopped", 5, code)
    assert os.listdir(tmp_path / "out" / "checkpoints") == ["step-00000005"]
    assert "run the same command again" in listener.messages[-1]
    run(runs.spec(data, tmp_path / "out"))
    assert runs.records(tmp_path / "out") == runs.records(one)
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == (one / "model/model.safetensors").read_bytes()


def test_a_finished_run_has_nothing_to_do(one, capsys):
    before = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    assert main([str(one / "run.yaml")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*")} == before


def test_the_resolved_file_repeats_the_run(one, tmp_path):
    assert main([str(one / "run.yaml"), f"output={tmp_path / 'again'}"]) == 0
    assert runs.records(tmp_path / "again") == runs.records(one)
    assert (tmp_path / "again/run.yaml").read_bytes() == (one / "run.yaml").read_bytes()


@pytest.mark.parametrize(
    "edit", ["seed=1", "optimizer.learning_rate=0.02", "data.length=16", "model.layers.0.ffn.hidden=8"]
)
def test_the_directory_of_another_run_is_refused(one, capsys, edit):
    assert main([str(one / "run.yaml"), edit, f"output={one}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert edit.partition("=")[0] in message
    assert "another run" in message


def test_the_checkpoint_of_another_run_is_refused(one, data, tmp_path):
    other = runs.spec(data, tmp_path / "out", "optimizer.learning_rate=0.02")
    shutil.copytree(one / "checkpoints", tmp_path / "out" / "checkpoints")
    (tmp_path / "out" / "run.yaml").write_text(other.to_yaml())
    with pytest.raises(RunError, match=r"step-00000020: is a checkpoint of run"):
        run(other)


def test_bfloat16_trains_and_keeps_float32_weights(one, data, tmp_path):
    run(runs.spec(data, tmp_path / "out", "training.precision=bfloat16"))
    halves, whole = runs.losses(tmp_path / "out"), runs.losses(one)
    assert not torch.equal(halves, whole)
    torch.testing.assert_close(halves, whole, rtol=0.05, atol=0)
    assert all(weight.dtype == torch.float32 for weight in load(tmp_path / "out/model").state_dict().values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_fails_the_job_and_is_not_saved(data, tmp_path, capsys, monkeypatch, bad):
    from fusiontree.training.titan import trainer

    calls, real = [], trainer.StepPart

    def broken(nats, *rest):
        calls.append(None)
        return real(nats * (bad if len(calls) > 9 else 1.0), *rest)

    monkeypatch.setattr(trainer, "StepPart", broken)
    file = runs.write_run(tmp_path / "run.json", data)
    assert main([str(file), f"output={tmp_path / 'out'}", "checkpoint.every=1", "validation=null"]) == 1
    assert capsys.readouterr().err == f"error: step 10: the loss is {bad}\n"
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == ["step-00000008", "step-00000009"]
    assert not (tmp_path / "out" / "model").exists()
    monkeypatch.undo()
    assert main([str(file), f"output={tmp_path / 'out'}", "checkpoint.every=1", "validation=null"]) == 0


def test_a_held_out_loss_that_is_no_number_fails_the_job(data, tmp_path, capsys, monkeypatch):
    from fusiontree.training.titan import trainer
    from fusiontree.training.validation import Score

    monkeypatch.setattr(trainer, "measure", lambda *args, **options: Score(math.nan, 1))
    file = runs.write_run(tmp_path / "run.json", data)
    overrides = ("training.steps=2", "validation.every=1", "checkpoint.every=5")
    assert main([str(file), f"output={tmp_path / 'out'}", *overrides]) == 1
    assert capsys.readouterr().err == "error: step 1: the held-out loss is nan\n"


def test_rows_that_cannot_be_dealt_out_are_one_line(data, tmp_path, capsys):
    file = runs.write_run(tmp_path / "run.json", data)
    assert main([str(file), "training.microbatch_rows=3", f"output={tmp_path / 'out'}"]) == 2
    message = "error: training.microbatch_rows: expected a divisor of the 4 rows of a step, found 3\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()
