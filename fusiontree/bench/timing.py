"""Timing a call that may be repeated."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FEWEST, MOST = 3, 10_000
"""Bounds of how often a call is timed, however long it takes."""
WARM_UP = 0.1
"""The share of the time that is spent first and not counted."""


class Timing(NamedTuple):
    """How long one call takes.

    Attributes:
        seconds: the median.
        spread: half the distance between the quartiles, as a share of the median.
        repeats: how many calls were timed.
    """

    seconds: float
    spread: float
    repeats: int


def measure(call: Callable[[], object], device: torch.device, *, seconds: float = 1.0) -> Timing:
    """Warm up, then repeat a call for about `seconds`; a call on an accelerator ends when its work there has."""
    repeat(call, device, seconds=WARM_UP * seconds, fewest=2)
    times = repeat(call, device, seconds=seconds)
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(middle, (high - low) / (2 * middle), len(times))


def repeat(call: Callable[[], object], device: torch.device, *, seconds: float, fewest: int = FEWEST) -> list[float]:
    """The times of calls one after another, until they have taken `seconds`."""
    times: list[float] = []
    while len(times) < fewest or (sum(times) < seconds and len(times) < MOST):
        times.append(_once(call, device))
    return times


def _once(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
