"""`fusiontree bench kernels`: cases, limits, timing, rows, and what is printed. No speed is expected."""

import json
from dataclasses import replace

import pytest
import torch
from command_line import fusiontree

from fusiontree.bench import kernels, table
from fusiontree.bench.kernels import (
    CASES,
    FORWARD,
    TASKS,
    TRAINING,
    Form,
    Settings,
    error_of,
    forms,
    measure_form,
    work,
)
from fusiontree.bench.limits import MachineLimits, measure_limits
from fusiontree.bench.timing import FEWEST, measure
from fusiontree.errors import FusionTreeError
from fusiontree.kernels import OPS
from fusiontree.kernels.attention import ATTENTION_STEP

CPU = torch.device("cpu")
QUICK = Settings(64, torch.float32, CPU, MachineLimits(1e9, 1e9), seconds=0.0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Errors on little, on one thread."""
    monkeypatch.setattr(kernels, "SMALL", 48)
    torch.set_num_threads(1)


@pytest.fixture
def planted():
    """A backend that is wrong, and one that breaks."""

    @ATTENTION_STEP.backend("wrong", priority=-1)
    def wrong(inputs):
        return OPS["attention_step"](inputs, "product") * 1.5

    @ATTENTION_STEP.backend("broken", priority=-1)
    def broken(inputs):
        raise TypeError("an argument\nhas gone")

    yield
    del ATTENTION_STEP.backends["wrong"], ATTENTION_STEP.backends["broken"]


def plain(form):
    return not form.compiled and form.backend != "flex_cpu"  # that one compiles


def test_every_operator_has_a_case_and_every_backend_is_in_it_once():
    assert {case.op for case in CASES.values()} == set(OPS)
    for name, case in CASES.items():
        own = [form.backend for form in forms() if form.case == name and not form.compiled]
        assert sorted(own) == sorted(OPS[case.op].backends)
        assert set(case.compiled) == {form.backend for form in forms() if form.case == name and form.compiled}


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_served_or_says_why_not(name):
    for form in filter(plain, (form for form in forms() if form.case == name)):
        row = measure_form(form, QUICK)
        assert not row.failures
        assert set(row.speeds) | set(row.refusals) == set(TASKS)
        assert not set(row.speeds) & set(row.refusals)
        assert all(row.refusals.values())
        assert all(speed.tokens_per_second > 0 and speed.share_of_limit > 0 for speed in row.speeds.values())
        assert all(speed.repeats >= FEWEST for speed in row.speeds.values())
        assert not row.wrong, (form, row.error)
        json.dumps(table.data(row))


def test_packed_documents_are_each_counted_alone():
    alone, packed = CASES["attention"], CASES["attention, packed"]
    assert packed.flops(42) == 4 * alone.flops(10) + alone.flops(2)


def test_training_is_more_work():
    case = CASES["ssd"]
    inputs = case.inputs(40, torch.bfloat16)
    forward, training = (work(case, 40, inputs, task) for task in TASKS)
    assert training.flops == 3 * forward.flops
    tensors = [tensor for tensor in (*inputs, *inputs.results()) if tensor is not None]
    assert forward.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert 2 * forward.bytes < training.bytes < 3 * forward.bytes


def test_inputs_depend_on_the_seed_alone():
    one, same, other = (CASES["ssd"].inputs(8, torch.float32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.x, other.x)


def test_one_backend_is_picked_for_each_task():
    rows = [measure_form(form, QUICK) for form in filter(plain, forms(["ssd"]))]
    for task in TASKS:
        assert [row.form.backend for row in rows if task in row.speeds and row.speeds[task].picked] == ["chunked"]


def test_a_wrong_backend_shows_its_error(planted):
    row = measure_form(Form("attention_step", "wrong"), QUICK)
    assert row.wrong
    assert row.error == pytest.approx(0.5, rel=1e-3)
    assert "wrong" in table.cells(row, TASKS, 64)[-1]
    assert error_of(Form("attention_step", "product"), torch.float32, CPU) < 1e-5


def test_a_broken_backend_is_one_line_among_the_others(planted):
    forward = replace(QUICK, tasks=(FORWARD,))
    rows = [measure_form(Form("attention_step", name), forward) for name in ("broken", "product")]
    assert rows[0].failures[FORWARD] == "TypeError: an argument"
    assert rows[1].speeds
    assert table.notes(rows, (FORWARD,)) == {"failed: TypeError: an argument": ["broken"]}


def test_reasons_are_shared_and_name_the_task_where_the_other_is_served():
    rows = [measure_form(form, QUICK) for form in filter(plain, forms(["attention_step"]))]
    assert table.notes(rows, TASKS) == {
        "no forward+backward: it is for decoding": ["flash_cpu", "product", "reference"]
    }
    rows = [measure_form(Form("ssd", name), QUICK) for name in ("mamba_ssm", "fla")]
    assert table.notes(rows, TASKS) == {"only on CUDA devices": ["mamba_ssm", "fla"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_limits_are_positive(dtype):
    assert min(measure_limits(dtype, CPU, side=32, copied=2**16, seconds=0.01)) > 0


def test_timing_counts_no_warm_up():
    calls = []
    timing = measure(lambda: calls.append(1), CPU, seconds=0.0)
    assert timing.repeats == FEWEST < len(calls)
    assert timing.seconds > 0 and timing.spread >= 0


def bench(*arguments, **environment):
    return fusiontree("bench", "kernels", *arguments, **environment)


QUICKLY = ("--op", "attention_step", "--tokens", "32", "--seconds", "0", "--threads", "1", "--dtype", "float32")


def test_json_holds_all():
    done = bench(*QUICKLY, "--forward", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["limits"]["flops_per_second"] > 0 and data["limits"]["bytes_per_second"] > 0
    assert data["threads"] == 1
    assert {row["backend"] for row in data["rows"]} == set(ATTENTION_STEP.backends)
    assert all(row[FORWARD]["share_of_limit"] > 0 and TRAINING not in row for row in data["rows"])
    assert done.stderr == ""


def test_the_table_fits_a_narrow_terminal():
    done = bench(*QUICKLY, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "decoding 8 rows over 32 slots" in done.stdout
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if line.startswith(tuple(ATTENTION_STEP.backends)) and "%" in line)


@pytest.mark.parametrize(
    ("device", "said"), [("nowhere", "'nowhere' cannot be used here"), ("meta", "nothing is computed on 'meta'")]
)
def test_devices_that_compute_nothing_are_refused(device, said):
    with pytest.raises(FusionTreeError, match=said):
        kernels.settings(8, "float32", device)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "sssd"], "did you mean 'ssd'"),
        (["--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, said):
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
