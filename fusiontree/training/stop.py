"""Stopping a run in good order on Ctrl-C or when the machine is to be given back."""

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
        signal: what all processes have agreed to stop for, 0 for nothing. A signal that comes between two agreements
            changes nothing until the next: a process that stopped by itself would leave the others waiting.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._noted = 0
        self._before: dict[int, object] = {}

    @contextmanager
    def listening(self) -> Generator["Stop"]:
        """Take signals while a block runs (in the main thread; elsewhere Python delivers none)."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            self._restore()

    def agree(self) -> int:
        """The signal that any process got, 0 if none did; every process calls this."""
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
