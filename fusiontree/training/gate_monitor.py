"""Gate statistics taken while a model trains, and the file that hands them to pruning.

`gates.json` holds

    {"format": 1, "steps_seen": 1500, "spec": "<digest>",
     "gates": {path: {branch: {"mean", "std", "histogram", "entropy", "saturated", "count"}}}}

Statistics are taken every `monitor.every` steps, on all rows of the step. `gates` pools the last 10 observations,
because early gates say little about a trained model. `metrics.jsonl` keeps the mean and deviation of every
observation. `steps_seen` counts the optimiser steps of the run. Gates are in training mode: those with noise have
it. The fields are described at `GateStatistics`.
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
        """Take statistics every `every` steps of a run, and at its last step, `steps`."""
        self.every, self.steps = every, steps
        self.recent: deque[ByGate] = deque(maxlen=WINDOW)

    def due(self, step: int) -> bool:
        """Whether a step is to be observed."""
        return step % self.every == 0 or step == self.steps

    def add(self, observation: Observation) -> ByGate:
        """Sum an observation over all processes, keep it and return it; every process calls this."""
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
        """The recent statistics as plain data, which JSON stores without loss."""
        return {"recent": [plain(gates) for gates in self.recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the recent statistics from `state_dict`."""
        self.recent.clear()
        self.recent.extend(parsed(gates) for gates in state["recent"])


def _sum_over_processes(tensors: list[torch.Tensor]) -> None:
    """Sum tensors over all processes, in place, with one all-reduce."""
    if not tensors:
        return
    flat = torch.cat(tensors)
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.copy_(total)
