"""What `auto` in a run's training section comes to on this machine, and why."""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from fusiontree import machine
from fusiontree.training.errors import RunError
from fusiontree.training.run import RunSpec
from fusiontree.training.sections import ResolvedSpec

LONG = 2000
"""Steps of a run on a processor that are worth compiling for: compiling takes one to three minutes, and then a step of
`quickstart` takes four fifths of its time where bfloat16 has units, and no less where it has none."""


class AutoChoice(NamedTuple):
    """A value, and the reason for it in a few words."""

    value: str | bool
    reason: str

    def __str__(self) -> str:
        return f"{str(self.value).lower()} ({self.reason})"


def resolved(run: RunSpec, began: ResolvedSpec | None) -> tuple[RunSpec, AutoChoice]:
    """The run with its precision decided, and the reason. Every process of a run calls this.

    A run that began keeps the precision it began with (`began`), on any machine. A new run takes bfloat16 where the
    machines of all processes multiply it natively.
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
        RunError: they are, and nothing can be compiled here.
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
