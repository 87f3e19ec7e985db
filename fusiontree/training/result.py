"""How a run ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from fusiontree.training import metrics

Status = Literal["finished", "already finished", "stopped"]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        status: `finished`; `already finished`, if there was nothing to do; or `stopped` by a signal.
        steps: optimiser steps made in all.
        directory: where the results are.
        loss: the last recorded training loss, nats per label.
        bits_per_byte: the last measurement on held-out text.
        exit_code: 0, or 128 + the number of the signal (130 for SIGINT, 143 for SIGTERM).
    """

    status: Status
    steps: int
    directory: Path
    loss: float | None
    bits_per_byte: float | None
    exit_code: int

    @classmethod
    def read(cls, status: Status, directory: Path, *, steps: int, exit_code: int = 0) -> Self:
        """Read the loss and the bits per byte from the `metrics.jsonl` of the run."""
        records = metrics.read(directory / "metrics.jsonl")
        loss, bits = (metrics.latest(records, key) for key in ("loss", "validation_bits_per_byte"))
        return cls(status, steps, directory, loss, bits, exit_code)
