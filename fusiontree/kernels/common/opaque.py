"""Operators of our own that `torch.compile` does not look into."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Opaque:
    """A function as an operator of torch, and as itself where nobody needs the operator.

    That is where nothing is traced and no gradient is wanted: the first call of an operator imports the compiler, which
    takes two seconds, and every call takes some 50 us.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.run = run
        self.operator = torch.library.custom_op(f"fusiontree::{name}", run, mutates_args=())
        self.register_fake = self.operator.register_fake
        self.register_autograd = self.operator.register_autograd

    def __call__(self, *arguments: Any) -> Any:
        """The function's result, with a gradient if one is required."""
        if torch.compiler.is_compiling() or not all(map(_is_plain, arguments)):
            return self.operator(*arguments)
        return self.run(*arguments)


def opaque(name: str) -> Callable[[Callable[..., Any]], Opaque]:
    """Decorates the function that an operator runs; its annotations are the operator's schema."""
    return lambda run: Opaque(name, run)


def _is_plain(argument: Any) -> bool:
    """Whether it is no tensor, or one with values of its own that learns nothing."""
    if not isinstance(argument, Tensor):
        return True
    learns = argument.requires_grad and torch.is_grad_enabled()
    return type(argument) in (Tensor, nn.Parameter) and not argument.is_meta and not learns
