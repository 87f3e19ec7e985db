"""Chooses the values for `auto` in the training section of a run on this machine, with the reasons."""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from fusiontree import machine
from fusiontree.training.errors import RunError
from fusiontree.training.run import RunSpec
from fusiontree.training.sections import ResolvedSpec

LONG = 2000
"""Steps from which compiling pays on a CPU. Compiling takes one to three minutes; a step of `quickstart` then takes 4/5
of its time if the CPU has units for bfloat16, and as long as before if it has none."""


class AutoChoice(NamedTuple):
    """A value, and the reason for it in a few words."""

    value: str | bool
    reason: str

    def __str__(self) -> str:
        return f"{str(self.value).lower()} ({self.reason})"


def resolved(run: RunSpec, began: ResolvedSpec | None) -> tuple[RunSpec, AutoChoice]:
    """Returns the run with its precision decided, and the reason. Every process of a run calls this.

    With `auto`, a run that began keeps its precision (`began`) on any machine. A new run takes bfloat16 if every
    process is on a GPU or on a CPU that multiplies it natively.
    """
    choice = _precision(run, began)
    native = torch.tensor(int(choice.value == "bfloat16"))
    dist.all_reduce(native, dist.ReduceOp.MIN)
    if choice.value == "bfloat16" and not native:
        choice = AutoChoice("float32", "the machine of another process has no units for bfloat16")
    name: Literal["float32", "bfloat16"] = "bfloat16" if native else "float32"
    return run.model_copy(update={"resolved": ResolvedSpec(precision=name)}), choice


def _precision(run: RunSpec, began: ResolvedSpec | None) -> AutoChoice:
    if run.training.precision != "auto":
        return AutoChoice(run.training.precision, "as the run says")
    kept = began or run.resolved
    if kept is not None:
        return AutoChoice(kept.precision, "as the run began")
    if machine.device_type() == "cuda":
        return AutoChoice("bfloat16", "on a GPU")
    if machine.multiplies(torch.bfloat16):
        return AutoChoice("bfloat16", "the processor has units for it")
    return AutoChoice("float32", "the processor has no units for bfloat16")


def compiles(run: RunSpec) -> AutoChoice:
    """Whether layers are to be compiled.

    Raises:
        RunError: `training.compile` is true, and nothing can be compiled on this machine.
    """
    asked, device = run.training.compile, machine.device_type()
    if asked is False:
        return AutoChoice(False, "as the run says")
    if asked == "auto" and device == "cpu" and (why := _too_little_gain(run)):
        return AutoChoice(False, why)
    refusal = machine.compile_refusal(device)
    if refusal is not None and asked is True:
        raise RunError(f"training.compile: found true, nothing can be compiled here ({refusal}); use auto or false")
    return AutoChoice(refusal is None, refusal or "in the first step, which takes a minute or more")


def _too_little_gain(run: RunSpec) -> str | None:
    """Why compiling for a processor would take more time than it saves, or None."""
    if not machine.multiplies(torch.bfloat16):
        return "it gains nothing on a processor without units for bfloat16"
    return f"it pays from {LONG} steps on" if run.training.steps < LONG else None
