"""Gate statistics taken while a model trains, and the file that hands them to pruning.

`gates.json` holds

    {"format": 1, "steps_seen": 1500, "spec": "<digest>",
     "gates": {path: {branch: {"mean", "std", "histogram", "entropy", "saturated", "count"}}}}

`gates` pools the most recent window: the last 10 times that statistics were taken, every `monitor.every` steps
on all rows of the step, because early gates say little about a trained model. The means and deviations of every
time since the run began stay in `metrics.jsonl`. `steps_seen` is how many optimiser steps the run has made. The
values are those of training, with the noise of gates that have some. Fields are those of `GateStatistics`.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusiontree.core.probes.gate_statistics import ByGate, Observation, parsed, plain, pooled
from fusiontree.files import write_json

FORMAT = 1
WINDOW = 10


class GateMonitor:
    """The statistics of the last observations."""

    def __init__(self, every: int, steps: int) -> None:
        """Take statistics every so many of a run's steps, and at its last."""
        self.every, self.steps = every, steps
        self.recent: deque[ByGate] = deque(maxlen=WINDOW)

    def due(self, step: int) -> bool:
        """Whether a step is to be observed."""
        return step % self.every == 0 or step == self.steps

    def add(self, observation: Observation) -> ByGate:
        """Take note of a step's observation, summed over all processes; every process calls this."""
        _sum_over_processes(observation.tensors())
        gates = dict(observation)
        self.recent.append(gates)
        return gates

    def document(self, step: int, digest: str) -> dict[str, Any]:
        """The contents of `gates.json` after a step of the model with this digest."""
        return {"format": FORMAT, "steps_seen": step, "spec": digest, "gates": plain(pooled(self.recent))}

    def write(self, path: Path, step: int, digest: str) -> None:
        """Write `gates.json`, all or nothing."""
        write_json(path, self.document(step, digest))

    def state_dict(self) -> dict[str, Any]:
        """Plain data, which JSON keeps to the last bit."""
        return {"recent": [plain(gates) for gates in self.recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from plain data."""
        self.recent.clear()
        self.recent.extend(parsed(gates) for gates in state["recent"])


def _sum_over_processes(tensors: list[torch.Tensor]) -> None:
    """In place, in one message."""
    if not tensors:
        return
    flat = torch.cat(tensors)
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.copy_(total)
