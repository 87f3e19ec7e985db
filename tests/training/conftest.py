"""One corpus and a few runs that many tests look at."""

from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as runs


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return runs.write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl")


@pytest.fixture(scope="session")
def data(corpus) -> dict[str, Any]:
    return runs.run_data(corpus)


@pytest.fixture(scope="session")
def one(data, tmp_path_factory) -> Path:
    """The undisturbed run in one process."""
    from fusiontree.recipes.train import run

    directory = tmp_path_factory.mktemp("one") / "out"
    result = run(runs.spec(data, directory))
    assert (result.status, result.steps, result.exit_code) == ("finished", runs.STEPS, 0)
    return directory


@pytest.fixture(scope="session")
def two(data, tmp_path_factory) -> Path:
    """The same run in two processes that share the weights, each with two micro-batches a step."""
    folder = tmp_path_factory.mktemp("two")
    file, log, directory = runs.write_run(folder / "run.json", data), folder / "log", folder / "out"
    overrides = (f"output={directory}", "training.microbatch_rows=1")
    process = runs.start(runs.command(file, *overrides, processes=2), log)
    assert process.wait() == 0, log.read_text()
    return directory
