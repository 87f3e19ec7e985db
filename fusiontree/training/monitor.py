"""Gate statistics taken while a model trains, and the file that hands them to pruning.

`gates.json` holds

    {"format": 1, "steps_seen": 1500, "spec": "<digest>",
     "gates": {path: {branch: {"mean", "std", "histogram", "entropy", "saturated", "count"}}}}

`gates` pools the most recent window: the last 10 times that statistics were taken, every `monitor.every` steps
on all rows of the step, because early gates say little about a trained model. The means and deviations of every
time since the run began stay in `metrics.jsonl`. `steps_seen` is how many optimiser steps the run has made. The
values are those of training, with the noise of gates that have some. Fields are those of
`fusiontree.core.probes.gate_statistics`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fusiontree.core.probes.gate_statistics import Observation
from fusiontree.files import write_json

FORMAT = 1
WINDOW = 10

Statistics = dict[str, Any]
"""One branch's, as plain data."""
Gates = dict[str, dict[str, Statistics]]
"""By gate path, then branch."""


class GateMonitor:
    """Statistics of the last observations, as plain data that JSON keeps to the last bit."""

    def __init__(self, every: int, steps: int) -> None:
        """Take statistics every so many of a run's steps, and at its last."""
        self.every, self.steps = every, steps
        self.recent: list[Gates] = []

    def due(self, step: int) -> bool:
        """Whether a step is to be observed."""
        return step % self.every == 0 or step == self.steps

    def add(self, observation: Observation) -> Gates:
        """Take note of a step's observation, summed over all processes; every process calls this."""
        for tensor in observation.tensors():
            dist.all_reduce(tensor)
        gates = observation.data()
        self.recent = [*self.recent, gates][-WINDOW:]
        return gates

    def document(self, step: int, digest: str) -> dict[str, Any]:
        """What `gates.json` says after a step of a model with this digest."""
        return {"format": FORMAT, "steps_seen": step, "spec": digest, "gates": pooled(self.recent)}

    def write(self, path: Path, step: int, digest: str) -> None:
        """Write `gates.json`, all or nothing."""
        write_json(path, self.document(step, digest))

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"recent": self.recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from plain data."""
        self.recent = list(state["recent"])


def pooled(parts: Iterable[Gates]) -> Gates:
    """The statistics of several observations as one."""
    found: dict[str, dict[str, list[Statistics]]] = {}
    for part in parts:
        for path, branches in part.items():
            for branch, statistics in branches.items():
                found.setdefault(path, {}).setdefault(branch, []).append(statistics)
    return {path: {b: _pooled(parts) for b, parts in branches.items()} for path, branches in found.items()}


def _pooled(parts: list[Statistics]) -> Statistics:
    """Means weighted by counts; the variance is that of the means plus the mean of the variances."""
    count = sum(part["count"] for part in parts)
    shares = [part["count"] / max(count, 1) for part in parts]

    def mean(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    center = mean(part["mean"] for part in parts)
    variance = mean(part["std"] ** 2 + (part["mean"] - center) ** 2 for part in parts)
    bins = zip(*(part["histogram"] for part in parts), strict=True)
    return {
        "mean": center,
        "std": variance**0.5,
        "histogram": [mean(values) for values in bins],
        "entropy": mean(part["entropy"] for part in parts),
        "saturated": mean(part["saturated"] for part in parts),
        "count": count,
    }
