"""Measuring a model in training on held-out text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fusiontree.compiling import eagerly
from fusiontree.core.model.model import LanguageModel
from fusiontree.core.probes import probes
from fusiontree.data import IGNORED, EvaluationBatch, HeldOut


@dataclass(frozen=True)
class Score:
    """The score of the model on held-out text, as `fusiontree.data.HeldOut` defines it.

    Attributes:
        nats: the sum of -log p over all targets.
        bytes: the bytes of text, which equal the number of targets.
    """

    nats: float
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """Nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def measure(model: LanguageModel, held_out: HeldOut, *, rows: int, device: torch.device) -> Score:
    """Score all held-out rows. Every process calls this, runs its part of the rows, and gets the whole score.

    Args:
        model: put in evaluation mode for the measurement, then back.
        held_out: the rows to measure on.
        rows: rows that a process runs at a time.
        device: the device of the model.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    with probes.evaluating(model), eagerly():
        for batch in _share(held_out, rows):
            tokens, *places = (batch[key].to(device) for key in ("tokens", "positions", "documents"))
            labels = batch["labels"].to(device)
            totals[0] += float(model.cross_entropy(tokens, labels, positions=places[0], documents=places[1]))
            totals[1] += int(batch["bytes"].sum())
    dist.all_reduce(totals)
    return Score(float(totals[0]), int(totals[1]))


def _share(held_out: HeldOut, rows: int) -> Iterator[EvaluationBatch]:
    """The batches of this process. Every process gets as many, because a sharded model runs in all of them at once."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    rounds = math.ceil(len(held_out) / (rows * processes))
    for number in range(rounds):
        start = min((number * processes + rank) * rows, len(held_out))
        stop = min(start + rows, len(held_out))
        yield held_out.slice(start, stop) if start < stop else _idle(held_out)


def _idle(held_out: HeldOut) -> EvaluationBatch:
    """A row without labels and bytes, which adds nothing to the score."""
    batch = held_out.slice(0, 1)
    batch["labels"].fill_(IGNORED)
    batch["bytes"].zero_()
    return batch
