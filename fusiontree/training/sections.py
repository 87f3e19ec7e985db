"""The sections of a run file, apart from its model and its data."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fusiontree.core.spec.base import Count, Natural, Positive, Spec, invalid

Share = Annotated[float, Field(strict=True, ge=0, le=1)]
"""A part of the whole, from nothing to all of it."""
Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""How much of a running mean is kept at each step."""
Weight = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
"""How much a term counts; 0 is off."""


class TrainingSpec(Spec):
    """How long, and how much at a time.

    Attributes:
        steps: optimiser steps in all.
        rows: rows of tokens in a step, over all processes.
        microbatch_rows: rows that a process runs at a time; null: all of its share. It changes memory and
            speed, not the result (but for rounding).
        precision: what layers compute in; weights, gradients' sums and the optimiser stay float32. auto: bfloat16
            on GPUs and on processors that multiply it natively, otherwise float32.
        clip: the largest norm of the gradient; longer ones are shortened to it.
        threads: of torch in each process; null: torch's choice, and no more than the process's share of the cores.
        compile: `torch.compile` for the layers: from the second step on they are faster, the first takes a minute.
            auto: on GPUs, and in long runs on processors with units for bfloat16, where there is a compiler. Losses
            on gates, gate statistics and validation run uncompiled.
    """

    steps: Count
    rows: Count
    microbatch_rows: Count | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    clip: Positive = 1.0
    threads: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None
    compile: Literal[False, True, "auto"] = "auto"

    @model_validator(mode="after")
    def _whole_microbatches(self) -> Self:
        part = self.microbatch_rows
        if part is not None and self.rows % part:
            raise invalid({("microbatch_rows",): f"expected a divisor of the {self.rows} rows of a step, found {part}"})
        return self


class ResolvedSpec(Spec):
    """The values chosen for `auto` when the run began; a resumed run keeps them on any machine.

    Attributes:
        precision: what layers compute in.
    """

    precision: Literal["float32", "bfloat16"]


class OptimizerSpec(Spec):
    """AdamW (arXiv 1711.05101) under a schedule of warmup, a flat part and linear decay (arXiv 2405.18392).

    Attributes:
        learning_rate: at the top of the schedule.
        betas: of the running means of gradients and of their squares.
        eps: added to the root of the second.
        weight_decay: of the maps that components declare with `decay`; embeddings, encodings, norms, biases, a
            prefix and what states decay by have none.
        warmup: steps from 0 up to the top, cut to the length of the run.
        decay: the share of the steps at the end in which the rate falls.
        minimum: the share of the learning rate that it falls to.
    """

    learning_rate: Positive
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Weight = 0.1
    warmup: Natural = 0
    decay: Share = 1.0
    minimum: Share = 0.1


class ValidationSpec(Spec):
    """When to measure on the held-out documents, and on how much of them.

    Attributes:
        every: steps from one measurement to the next; the last step is always measured.
        rows: rows that a process runs at a time.
        bytes: the most to measure on, from the first held-out document on; null: all of it.
    """

    every: Count
    rows: Count = 8
    bytes: Count | None = None


class EverySpec(Spec):
    """Something that happens every so many steps."""

    every: Count = 10


class ParallelismSpec(Spec):
    """How processes share a model.

    Attributes:
        shard: over how many of them each copy of the weights is spread; -1: over all. Where it is fewer, there
            are several copies.
    """

    shard: Count | Literal[-1] = -1


class CheckpointSpec(Spec):
    """When to write checkpoints.

    Attributes:
        every: steps from one checkpoint to the next; the last step always has one.
        keep: how many of the newest stay on disk.
    """

    every: Count = 500
    keep: Count = 2
