"""Writes the records of a run to `metrics.jsonl`, TensorBoard and a listener.

A record is one JSON object on one line, about one step. Keys without a value in that step are left out:

    step               optimiser steps made
    loss               cross entropy of the step's rows, nats per label
    bits_per_byte      loss / ln 2, because every label of a byte model stands for one byte
    objectives         {name: value}, unweighted; left out if cross entropy is the only objective
    tokens             tokens trained on so far, over all processes
    tokens_per_second  of the training steps since the last record, over all processes; the time of validation
                       and checkpoints is not counted
    memory             bytes: the peak of the process (CPU) or of the device's allocator (GPU), process 0
    learning_rate      of this step
    grad_norm          before clipping
    gates              {path: {branch: {"mean", "std"}}} of this step's rows
    validation_loss, validation_bits_per_byte    held out, after this step
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fusiontree.files import write_text
from fusiontree.training.errors import RunError

Record = dict[str, Any]


class Listener(Protocol):
    """Receives the progress of a run. The listener of the caller is used in process 0 only."""

    def record(self, record: Record, steps: int) -> None:
        """Receive a new record of a run with `steps` steps in all."""

    def message(self, text: str) -> None:
        """Receive one line about the run as a whole."""


class Metrics:
    """Writes the records of a run to `metrics.jsonl` and, if asked for, TensorBoard."""

    def __init__(self, directory: Path, *, tensorboard: bool) -> None:
        """Prepare to write below a directory; `start` opens the files."""
        self.path = directory / "metrics.jsonl"
        self.events = directory / "tensorboard" if tensorboard else None
        self._writer: Any = None

    def start(self, step: int) -> None:
        """Continue after `step`: records of later steps are removed.

        Raises:
            RunError: TensorBoard is asked for and not installed.
        """
        kept = [line for line, record in _lines(self.path) if record["step"] <= step]
        write_text(self.path, "".join(kept))
        if self.events is not None:
            self._writer = _event_writer(self.events, step)

    def write(self, record: Record) -> None:
        """Add a record; it is in the file when this returns."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if self._writer is not None:
            for name, value in _scalars(record):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        if self._writer is not None:
            self._writer.close()


def read(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; a last line that was cut off is left out."""
    return [record for _, record in _lines(path)]


def latest(records: list[Record], key: str) -> float | None:
    """The last value of a key; None if no record has it."""
    return next((record[key] for record in reversed(records) if key in record), None)


def _lines(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            yield line.decode(errors="replace"), _parsed(path, number, line)


def _parsed(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise RunError(f"{path}: line {number} is not a record; found {line.strip()!r:.60}")
    return record


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif key != "step":
            yield f"{prefix}{key}", float(value)


def _event_writer(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError('tensorboard: is not installed; pip install "fusiontree[train]"') from None
    return SummaryWriter(str(directory), purge_step=step + 1)
