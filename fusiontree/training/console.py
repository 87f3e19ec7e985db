"""A run's progress as plain lines."""

import os
import sys
import time
from dataclasses import dataclass, field

from fusiontree.training.metrics import Record


@dataclass
class Console:
    """Prints one line per training record, and one line per validation measurement."""

    started: float = field(default_factory=time.monotonic)
    first: int | None = None

    def record(self, record: Record, steps: int) -> None:
        """Print the training figures and the validation figure, where the record has them."""
        if "loss" in record:
            self.message(self._training(record, steps))
        if "validation_bits_per_byte" in record:
            held_out = f"{record['validation_bits_per_byte']:.4f} bits per byte, held out"
            self.message(f"{_place(record['step'], steps)}  {held_out}")

    def message(self, text: str) -> None:
        """Print a line. If the pipe is closed, this line and all later ones are dropped and the run continues."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def _training(self, record: Record, steps: int) -> str:
        parts = [
            _place(record["step"], steps),
            f"loss {record['loss']:.4f}",
            f"{record['bits_per_byte']:.4f} bits per byte",
            f"grad {record['grad_norm']:.3f}",
            f"rate {record['learning_rate']:.2e}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['memory'] / 2**30:.2f} GiB",
            f"{self._left(record['step'], steps)} left",
        ]
        return "  ".join(parts)

    def _left(self, step: int, steps: int) -> str:
        """The estimated time to the end, at the mean pace since the first record; `?` at that record."""
        if self.first is None or step <= self.first:
            self.first, self.started = step, time.monotonic()
            return "?"
        seconds = (time.monotonic() - self.started) / (step - self.first) * (steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


class Silent:
    """A listener that prints nothing, for all processes but process 0."""

    def record(self, record: Record, steps: int) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


def _place(step: int, steps: int) -> str:
    return f"step {step:>{len(str(steps))}}/{steps}"
