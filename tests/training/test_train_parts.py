"""Small parts of training: who decays, how work is dealt out, what listens to signals, what progress looks like."""

import copy
import os
import signal

import pytest
import torch
import training_runs as runs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fusiontree import ModelSpec, build, load, load_spec, save
from fusiontree.errors import FusionTreeError
from fusiontree.training import Console, RunError
from fusiontree.training.decay import decayed
from fusiontree.training.parallel import copies, rows_at_a_time, shard, world
from fusiontree.training.stop import Stop


def test_only_matrices_that_map_features_decay():
    model = build(ModelSpec.parse(runs.hybrid({"kind": "sigmoid", "granularity": "channel", "rank": 4})), device="meta")
    names = set(decayed(model))
    expected_not = {
        "embedding.weight",
        "encodings.time.table",
        "layers.0.mixer.branches.mamba.A_log",
        "layers.0.mixer.branches.mamba.D",
        "layers.0.mixer.branches.mamba.dt_bias",
        "layers.0.mixer.gate.logit.bias",
        "layers.1.mixer.gate.logits.mamba.bias",
        "norm.weight",
    }
    every = {name for name, _ in model.named_parameters()}
    assert expected_not <= every
    assert not expected_not & names
    assert {"layers.0.mixer.gate.logit.weight", "layers.0.mixer.branches.mamba.x.weight"} <= names


RGLRU = {"kind": "rglru", "heads": 2, "head_dim": 4, "bias": True}
"""Whose gates have biases of two dimensions."""


def decays(layer: dict, **more) -> tuple[nn.Module, set[str]]:
    spec = {"vocab_size": 11, "width": 16, "layers": [layer], "head": {"tied": False, "bias": True}} | more
    model = build(ModelSpec.parse(spec))
    return model, set(decayed(model))


def test_biases_of_two_dimensions_and_the_prefix_do_not_decay():
    model, names = decays({"mixer": RGLRU}, prefix={"tokens": 3})
    every = {name for name, _ in model.named_parameters()}
    assert names == {
        f"layers.0.mixer.{part}.weight" for part in (*"xz", "conv", "input_gate", "recurrence_gate", "out")
    } | {"head.weight"}
    assert {"prefix.weight", "layers.0.mixer.input_gate.bias", "layers.0.mixer.recurrence_gate.bias"} <= every - names


def test_experts_decay_without_their_correction():
    moe = {"kind": "moe", "experts": 3, "hidden": 4, "top_k": 2, "router": {"correction": True}}
    _, names = decays({"ffn": moe})
    assert names == {
        f"layers.0.ffn.{part}" for part in ("router.weight", "experts.gate", "experts.up", "experts.down")
    } | {"head.weight"}


def test_what_decays_survives_copies_loading_shared_nodes_and_shards(tmp_path):
    use = {"kind": "use", "of": "block", "adapters": {"a": {"maps": ["x"], "rank": 2}}}
    model, names = decays({"mixer": use}, shared={"block": RGLRU})
    assert "shared.block.input_gate.weight" in names
    assert "layers.0.mixer.adapters.a.up.0.weight" in names
    save(model, tmp_path / "model")
    sharded = copy.deepcopy(model)
    with world():
        shard(sharded, init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)), precision="float32")
    for other in (copy.deepcopy(model), load(tmp_path / "model"), model.to(torch.float64), sharded):
        assert set(decayed(other)) == names


def test_maps_that_a_tool_adds_decay():
    model, names = decays({"mixer": RGLRU})
    added = nn.Sequential(nn.Linear(16, 2), nn.LayerNorm(2))
    model.layers[0].mixer.x.adapter = added
    assert set(decayed(model)) - names == {"layers.0.mixer.x.adapter.0.weight"}


def test_the_optimizer_has_every_parameter_once(data, tmp_path):
    import re

    from fusiontree.training.titan.config import optimizer

    run = runs.spec(data, tmp_path)
    groups = optimizer(run).param_groups
    names = [name for name, _ in build(run.model, device="meta").named_parameters()]
    assert [sum(bool(re.search(group.pattern, name)) for group in groups) for name in names] == [1] * len(names)
    assert [group.optimizer_kwargs["weight_decay"] for group in groups] == [run.optimizer.weight_decay, 0.0]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_rows_are_dealt_out_evenly_or_not_at_all(part, processes, rounds):
    assert rows_at_a_time(part * processes * rounds, part, processes) == part
    assert rows_at_a_time(part * processes, None, processes) == part
    if processes > 1:
        with pytest.raises(RunError, match=f"training.rows: expected a multiple of the {processes} processes"):
            rows_at_a_time(part * processes + 1, None, processes)


def test_shards_divide_the_processes():
    assert [copies(4, shard) for shard in (-1, 4, 2, 1)] == [(1, 4), (1, 4), (2, 2), (4, 1)]
    with pytest.raises(RunError, match=r"parallelism\.shard: expected a divisor of the 4 processes, found 3"):
        copies(4, 3)


def test_micro_batches_of_all_processes_make_up_a_step(data, tmp_path):
    import torch

    from fusiontree.training.titan.data import TitanLoader

    run = runs.spec(data, tmp_path)
    whole = run.text.batches(rows=4, seed=5)
    for processes, part in ((1, 4), (1, 1), (2, 1), (2, 2), (4, 1)):
        config = TitanLoader.Config(text=run.text, rows=4, seed=5)
        loaders = [config.build(dp_world_size=processes, dp_rank=r, local_batch_size=part) for r in range(processes)]
        for loader in loaders:
            loader.load_state_dict({"step": 3})
        iterators = [iter(loader) for loader in loaders]
        for step in (3, 4):
            rounds = 4 // (processes * part)
            rows = [next(iterator) for _ in range(rounds) for iterator in iterators]
            assert torch.equal(torch.cat([inputs["input"] for inputs, _ in rows]), whole.batch(step)["tokens"])
            assert torch.equal(torch.cat([labels for _, labels in rows]), whole.batch(step)["labels"])
            assert all(loader.state_dict()["step"] == step + 1 for loader in loaders)


@pytest.fixture
def interruptible():
    """Python's own SIGINT, which a shell that started the tests in the background takes away."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_is_noted_and_the_second_counts():
    before = signal.getsignal(signal.SIGINT)
    with world(), Stop().listening() as stop:
        assert stop.agree() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == 0  # the other processes may be a step further before they hear of it
        assert stop.agree() == stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_is_one_line_a_record(capsys):
    record = {
        "step": 5,
        "loss": 1.25,
        "bits_per_byte": 1.8034,
        "grad_norm": 0.5,
        "learning_rate": 0.003,
        "tokens_per_second": 12345.6,
        "memory": 2**30,
    }
    console = Console()
    console.record(record, 100)
    console.record({"step": 5, "validation_loss": 1.3, "validation_bits_per_byte": 1.875}, 100)
    console.record({"step": 6, "gates": {}}, 100)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step   5/100  loss 1.2500  1.8034 bits per byte")
    assert "12,346 tokens/s" in first
    assert "1.00 GiB" in first
    assert second == "step   5/100  1.8750 bits per byte, held out"


def test_presets_can_be_sharded_out_of_torchtitan():
    """`shard` is a plain function of a module and a mesh: one process, values unchanged."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from fusiontree.training.parallel import shard, world

    spec = load_spec("quickstart")
    tokens = torch.randint(0, 257, (1, 9))
    expected = build(spec)(tokens)
    with world():
        sharded = shard(build(spec), init_device_mesh("cpu", (1,)), precision="float32")
        assert torch.equal(sharded(tokens), expected)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "x", "WORLD_SIZE": "1"}, "environment: RANK: expected a whole number from 0 on, found 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "environment: WORLD_SIZE: expected a whole number from 1 on, found '0'"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            "the processes cannot join: ",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "the processes cannot join: .*MASTER_ADDR"),
    ],
)
def test_an_environment_that_torchrun_did_not_leave_is_one_line(monkeypatch, variables, line):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FusionTreeError, match=f"^{line}"), world():
        pass
