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
    """The length of training, and the size of a step.

    Attributes:
        steps: optimiser steps in all.
        rows: rows of tokens in a step, over all processes.
        microbatch_rows: rows that a process runs at a time; null: its whole share. The choice changes memory and
            speed, but not the result (except for rounding).
        precision: the dtype that layers compute in; weights, gradient sums and the optimiser stay float32. auto:
            bfloat16 on GPUs and on processors that multiply it natively, otherwise float32.
        clip: the largest norm of the gradient; a larger gradient is scaled down to this norm.
        threads: threads of torch in each process; null: torch's choice, at most the process's share of the cores.
        compile: whether to `torch.compile` the layers. The first step then takes a minute, later steps are faster.
            auto: on GPUs, and in long runs on processors with units for bfloat16, if there is a compiler. Losses
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
        precision: the dtype that layers compute in.
    """

    precision: Literal["float32", "bfloat16"]


class OptimizerSpec(Spec):
    """AdamW (arXiv 1711.05101) under a schedule of warmup, a flat part and linear decay (arXiv 2405.18392).

    Attributes:
        learning_rate: the rate at the top of the schedule.
        betas: decay rates of the running means of gradients and of squared gradients.
        eps: added to the root of the mean of squared gradients.
        weight_decay: applied to the maps that components declare with `decay`. Embeddings, encodings, norms, biases,
            a prefix and the decay rates of states have none.
        warmup: steps in which the rate rises from 0 to the top; at most the length of the run.
        decay: the share of the steps, at the end of the run, in which the rate falls.
        minimum: the final rate, as a share of `learning_rate`.
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
        bytes: the most bytes to measure on, from the first held-out document on; null: all of them.
    """

    every: Count
    rows: Count = 8
    bytes: Count | None = None


class EverySpec(Spec):
    """An action that happens every `every` steps."""

    every: Count = 10


class ParallelismSpec(Spec):
    """How processes share a model.

    Attributes:
        shard: the number of processes that each copy of the weights is spread over; -1: all of them. With fewer
            than all, there are several copies.
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
