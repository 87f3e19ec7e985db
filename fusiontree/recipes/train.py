"""The script for torchrun: `torchrun --nproc-per-node 2 -m fusiontree.recipes.train run.yaml training.steps=20`.

`python -m fusiontree.recipes.train` does the same in one process. The first argument is a run file or the name of
a recipe in this package (quickstart, v1, v2, v3). The other arguments are `path=value` edits of the run.

Exit codes: 0, finished (or finished before); 1, the job failed; 2, bad input, one line; 130 or 143, stopped by
SIGINT or SIGTERM after a checkpoint (torchrun itself then exits with 1). torchrun passes signals on to its
processes and kills them after 30 seconds.
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported
    from fusiontree.machine import prepare

    prepare()

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from fusiontree.errors import FusionTreeError, suggest
from fusiontree.training import RunError, RunSpec, TrainingFailed
from fusiontree.training.metrics import Listener
from fusiontree.training.output import Output
from fusiontree.training.result import TrainResult
from fusiontree.zoo.presets import named

USAGE = "usage: python -m fusiontree.recipes.train RUN.yaml [path=value ...]"


def recipes() -> list[str]:
    """The names of the run files in this package, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load_run(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a run from a file or a recipe, and apply edits.

    Raises:
        FusionTreeError: neither a run file nor the name of a recipe, or not a valid run.
    """
    path = named("run file or recipe", name_or_path)
    if path.suffix in (".yaml", ".yml", ".json") or os.path.isfile(path):  # Path.is_file raises at long names
        return RunSpec.from_file(path, overrides)
    if str(name_or_path) not in recipes():
        hint = f"; did you mean {path / 'run.yaml'}?" if os.path.isfile(path / "run.yaml") else ""
        known = hint or suggest(str(name_or_path), recipes())
        raise RunError(f"{name_or_path}: neither a run file nor a recipe{known}")
    return RunSpec.from_file(_folder() / f"{name_or_path}.yaml", overrides)


def run(run: RunSpec, *, listener: Listener | None = None) -> TrainResult:
    """Train, unless the run is finished already. That is checked before torchtitan is imported.

    Raises:
        FusionTreeError: bad input.
        TrainingFailed: the run cannot go on.
    """
    output = Output(run)
    run = output.spec
    output.check()
    if output.finished:
        return TrainResult.read("already finished", output.root, steps=run.training.steps)
    from fusiontree.training.titan import train

    return train(run, listener=listener)


def check(arguments: Sequence[str]) -> None:
    """Check a run file and its output directory before any process starts.

    Raises:
        FusionTreeError: bad input.
    """
    Output(load_run(arguments[0], arguments[1:])).check()


def main(argv: Sequence[str] | None = None) -> int:
    """Train by command-line arguments; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    rank = os.environ.get("RANK", "0")
    first = not rank.isdecimal() or int(rank) == 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE if first else "", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        result = run(load_run(arguments[0], arguments[1:]))
    except FusionTreeError as error:
        return _failed(error, 2, first=first)
    except TrainingFailed as error:
        return _failed(error, 1, first=first)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}", 1, first=first)
    if result.status == "already finished" and first:
        print(f"{result.directory}: the run is finished ({result.steps} steps); nothing to do")
    return result.exit_code


def _failed(error: Exception | str, code: int, *, first: bool) -> int:
    if first:
        print(f"error: {error}", file=sys.stderr)
    return code


def _folder() -> Path:
    return Path(str(files("fusiontree.recipes")))


def _exit(code: int) -> None:
    """End the process at once, because gloo's threads can abort a finished process while Python shuts down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main())
