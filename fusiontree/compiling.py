"""`torch.compile` for functions of fixed shapes. Whether it works here, `machine.compile_refusal` says.

The compiler takes seconds to import, so it is imported when something is compiled.
"""

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

FORMS = 64
"""How many shapes of one function are compiled before the others run as they are; torch's own limit is 8, and
the layers of a model share their code."""


def constant(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does, without importing the compiler, which takes a second."""
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    allow_forms()
    return torch.compile(function, dynamic=False, fullgraph=True)


def piece(function: Function, compiled: bool) -> Function:
    """The function, or its compiled form: the same numbers but for rounding. Each new shape is compiled anew."""
    return _compiled(function) if compiled and not _plain.blocks else function


def allow_forms() -> None:
    """Let `torch.compile` make more forms of one function than it would by itself."""
    config: Any = torch._dynamo.config  # pyright: ignore[reportPrivateImportUsage]
    config.recompile_limit = max(config.recompile_limit, FORMS)


def any_size(tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Let one form serve all sizes of the dimensions in which a tensor and one for another call differ."""
    sizes = zip(tensor.shape, like.shape, strict=True)
    for dimension in (place for place, (size, other) in enumerate(sizes) if size != other):
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)  # pyright: ignore[reportPrivateImportUsage]


class _Plain(threading.local):
    """How many blocks of `eagerly` a thread is in."""

    blocks = 0


_plain = _Plain()


@contextmanager
def eagerly() -> Generator[None]:
    """Run what is compiled as plain Python while the block runs."""
    imported = "torch._dynamo" in sys.modules  # if not, nothing is compiled yet, and `piece` compiles nothing
    _plain.blocks += 1
    try:
        with torch.compiler.set_stance("force_eager") if imported else nullcontext():
            yield
    finally:
        _plain.blocks -= 1
