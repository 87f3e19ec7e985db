"""The gate monitor: pooling is exact, windows move, and plain data is enough to go on."""

import json

import pytest
import torch
import training_runs as runs
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.core.probes.gate_statistics import Observation, plain, pooled
from fusiontree.training.gate_monitor import WINDOW, GateMonitor


def observed(*values: torch.Tensor) -> Observation:
    observation = Observation()
    for value in values:
        observation.add("layers.0.mixer.gate", {"a": value, "b": 1 - value}, None)
    return observation


def draw(seed: int, size: int) -> torch.Tensor:
    return torch.rand(1, size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(deadline=None)
def test_pooled_statistics_are_those_of_all_values_together(sizes):
    values = [draw(seed, size) for seed, size in enumerate(sizes)]
    parts = plain(pooled([observed(value) for value in values]))
    whole = plain(observed(*values))
    for branch, statistics in whole["layers.0.mixer.gate"].items():
        found = parts["layers.0.mixer.gate"][branch]
        assert found.keys() == statistics.keys()
        for key, expected in statistics.items():
            expected = list(expected) if isinstance(expected, tuple) else expected
            assert found[key] == pytest.approx(expected, abs=1e-9), key


@pytest.fixture
def world():
    from fusiontree.training.parallel import world

    with world():
        yield


def test_the_file_describes_the_most_recent_window(world, tmp_path):
    monitor = GateMonitor(every=10, steps=25)
    assert [step for step in range(1, 26) if monitor.due(step)] == [10, 20, 25]
    monitor.add(observed(torch.full((1, 50, 3), 0.9)))
    for _ in range(WINDOW):
        monitor.add(observed(torch.full((1, 4, 3), 0.2)))
    monitor.write(tmp_path / "gates.json", 25, "abc")
    document = json.loads((tmp_path / "gates.json").read_text())
    assert {key: document[key] for key in ("format", "steps_seen", "spec")} == {
        "format": 1,
        "steps_seen": 25,
        "spec": "abc",
    }
    assert document["gates"]["layers.0.mixer.gate"]["a"]["mean"] == pytest.approx(0.2)
    assert document["gates"]["layers.0.mixer.gate"]["a"]["count"] == WINDOW * 12


def test_going_on_from_json_is_as_if_nothing_had_been(world):
    through, first = GateMonitor(1, 9), GateMonitor(1, 9)
    for seed in range(3):
        through.add(observed(draw(seed, 5)))
        first.add(observed(draw(seed, 5)))
    second = GateMonitor(1, 9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for monitor in (through, second):
        monitor.add(observed(draw(9, 5)))
    assert json.dumps(second.document(4, "d")) == json.dumps(through.document(4, "d"))


def test_observing_changes_nothing_about_a_run(one, data, tmp_path):
    from fusiontree.recipes.train import run

    run(runs.spec(data, tmp_path / "out", "monitor.every=1000"))
    assert torch.equal(runs.losses(tmp_path / "out"), runs.losses(one))
