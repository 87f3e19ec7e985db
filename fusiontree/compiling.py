"""`torch.compile` for functions of fixed shapes. `machine.compile_refusal` tells whether it works on this machine.

The compiler takes seconds to import, so it is imported at the first compilation.
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
"""How many forms of one function may be compiled. With `fullgraph` torch raises an error at the next form. torch's own
limit, 8, is too low, because the layers of a model share their code."""


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, without the import of the compiler, which takes a second."""
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    allow_forms()
    return torch.compile(function, dynamic=False, fullgraph=True)


def piece(function: Function, compiled: bool) -> Function:
    """The function, or its compiled form, which differs only by rounding. Each new shape compiles a new form."""
    return _compiled(function) if compiled and not _plain.blocks else function


def allow_forms() -> None:
    """Raise the number of forms of one function that `torch.compile` allows to `FORMS`."""
    config: Any = torch._dynamo.config  # pyright: ignore[reportPrivateImportUsage]
    config.recompile_limit = max(config.recompile_limit, FORMS)


def any_size(tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Let one compiled form serve all sizes of the dimensions in which `tensor` and `like` differ."""
    sizes = zip(tensor.shape, like.shape, strict=True)
    for dimension in (place for place, (size, other) in enumerate(sizes) if size != other):
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)  # pyright: ignore[reportPrivateImportUsage]


class _Plain(threading.local):
    """How many nested blocks of `eagerly` the thread is in."""

    blocks = 0


_plain = _Plain()


@contextmanager
def eagerly() -> Generator[None]:
    """Run compiled functions as plain Python while the block runs."""
    imported = "torch._dynamo" in sys.modules  # if not, nothing is compiled yet, and `piece` compiles nothing
    _plain.blocks += 1
    try:
        with torch.compiler.set_stance("force_eager") if imported else nullcontext():
            yield
    finally:
        _plain.blocks -= 1
