"""Functions of fixed shapes, compiled on request: an operator that is opaque to `torch.compile` compiles its own."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def _compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False, fullgraph=True)


def piece(function: Function, compiled: bool) -> Function:
    """The function, or its compiled form: the same numbers but for rounding. Each new shape is compiled anew."""
    return _compiled(function) if compiled else function
