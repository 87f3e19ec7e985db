"""Stops a run cleanly after a step, on Ctrl-C (SIGINT) or before the machine is taken back (SIGTERM)."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Remembers the first SIGINT or SIGTERM. A second one ends the process at once.

    Attributes:
        signal: the signal that all processes have agreed to stop for, 0 for none. A new signal takes effect at the
            next agreement, because a process that stopped alone would leave the others waiting.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._noted = 0
        self._before: dict[int, object] = {}

    @contextmanager
    def listening(self) -> Generator["Stop"]:
        """Handle signals while a block runs. Only in the main thread: Python allows no handlers elsewhere."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            self._restore()

    def agree(self) -> int:
        """Returns the signal that any process got, 0 for none (the largest of several). Every process calls this."""
        number = torch.tensor(self._noted)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.signal = int(number)
        return self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}
