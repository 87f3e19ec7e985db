"""Checkpoints: tensors as safetensors, the rest as JSON, no pickle. A checkpoint is complete or absent.

`checkpoints/step-00000200/` holds `shard-*.safetensors`, one a process, written by torch's distributed
checkpoint so that any number of processes can read them, and `state.json`. Until it is complete it is called
`.step-00000200.partial`.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from fusiontree.files import read_json, write_json
from fusiontree.training.errors import RunError, TrainingFailed

FORMAT = 2
"""Format of the state and of tensor names. In format 1 windowed and global heads of attention shared one map."""
STATE = "state.json"
_COMPLETE = re.compile(r"step-(\d{8,})")

Tensors = Mapping[str, Tensor]


class Checkpoints:
    """The checkpoints of one run. Every process calls `save`, `load` and `clean`, in the same order."""

    def __init__(self, directory: Path, *, run: str, keep: int) -> None:
        """Read and write below `directory`; `run` is the digest of the run that owns the checkpoints."""
        self.directory, self.run, self.keep = directory, run, keep

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.exists() else []
        return sorted(int(match[1]) for name in names if (match := _COMPLETE.fullmatch(name)))

    def path(self, step: int) -> Path:
        """The directory of the checkpoint of a step."""
        return self.directory / f"step-{step:08}"

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove the oldest beyond `keep`.

        Raises:
            TrainingFailed: a tensor holds a value that is not finite, or the checkpoint cannot be written. Older
                checkpoints stay on disk.
        """
        _refuse_broken(step, tensors)
        partial = self.directory / f".{self.path(step).name}.partial"
        try:
            self._write(step, partial, tensors, state)
        except (OSError, CheckpointException) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise TrainingFailed(f"{self.path(step)}: cannot be written: {_cause(error)}") from None

    def _write(self, step: int, partial: Path, tensors: Tensors, state: Mapping[str, Any]) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        save(dict(tensors), storage_writer=writer, no_dist=_alone())
        if dist.get_rank() == 0:
            write_json(partial / STATE, {"format": FORMAT, "run": self.run, "step": step, "state": state})
            partial.rename(self.path(step))
            self._remove(self.steps()[: -self.keep])
        dist.barrier()

    def load(self, step: int, tensors: Tensors) -> dict[str, Any]:
        """Fill tensors, in place, from a checkpoint. Returns the `state` that was saved beside them.

        Raises:
            RunError: the checkpoint is broken, belongs to another run, or does not match `tensors`.
        """
        path, advice = self.path(step), "remove that directory to go on from the checkpoint before it"
        try:
            document = read_json(path / STATE)
            found, run, state = document["format"], document["run"], document["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path / STATE}: cannot be read ({_cause(error)}); {advice}") from None
        if run != self.run:
            raise RunError(f"{path}: is a checkpoint of run {run}, this is run {self.run}")
        if found not in (1, FORMAT):
            raise RunError(f"{path}: expected a checkpoint of format 1 or {FORMAT}, found {found!r:.20}")
        try:
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=_alone())
        except (CheckpointException, OSError, SafetensorError) as error:
            if found != FORMAT:
                advice = "an older FusionTree wrote it, which named some tensors otherwise: finish the run with that"
            raise RunError(f"{path}: cannot be read ({_cause(error)}); {advice}") from None
        return state

    def clean(self) -> None:
        """Remove the partial checkpoints that an interrupted `save` left."""
        if dist.get_rank() == 0 and self.directory.exists():
            for path in self.directory.glob(".step-*.partial"):
                shutil.rmtree(path)
        dist.barrier()

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            shutil.rmtree(self.path(step))


def _cause(error: BaseException) -> str:
    """The first failure behind an error, in a few words."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {' '.join(text.split()):.200}"


def _alone() -> bool:
    """A single process needs no coordination, and gloo's threads would join OpenMP and slow every later step by 40
    %."""
    return dist.get_world_size() == 1


def _refuse_broken(step: int, tensors: Tensors) -> None:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    broken = torch.tensor(sum(not bool(torch.isfinite(t).all()) for t in local))
    dist.all_reduce(broken)
    if broken:
        raise TrainingFailed(f"step {step}: a weight is not finite; no checkpoint was written")
