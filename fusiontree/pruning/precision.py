"""A model that computes in another type, without a copy of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fusiontree.compiling import eagerly
from fusiontree.core.model import LanguageModel


@contextmanager
def computing_in(model: LanguageModel, dtype: torch.dtype) -> Iterator[None]:
    """Each module's own parameters have another type while it runs, so that only one module's are there twice.

    Those of the embedding have it all the time: a tied head reads them, and caches are made in their type.
    """
    with eagerly(), ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)) and module is not model.embedding:
                held: list[dict[str, Any]] = []
                stack.callback(module.register_forward_pre_hook(_widen(held, dtype)).remove)
                stack.callback(module.register_forward_hook(_restore(held), always_call=True).remove)
        held = []
        _widen(held, dtype)(model.embedding)
        stack.callback(_restore(held), model.embedding)
        yield


def _widen(held: list[dict[str, Any]], dtype: torch.dtype) -> Any:
    def widen(module: nn.Module, *_: Any) -> None:
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        held.append(own)
        cast = {
            name: nn.Parameter(parameter.detach().to(dtype), requires_grad=False) for name, parameter in own.items()
        }
        module._parameters.update(cast)

    return widen


def _restore(held: list[dict[str, Any]]) -> Any:
    def restore(module: nn.Module, *_: Any) -> None:
        if held:  # another hook may have failed before the parameters were widened
            module._parameters.update(held.pop())

    return restore
