"""A model that computes in another type, without a copy of it."""

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fusiontree.compiling import eagerly
from fusiontree.core.contracts.node import Node
from fusiontree.core.model.model import LanguageModel

Held = list[tuple[dict[str, Any], dict[str, Any]]]
"""Dictionaries of parameters, and what belongs into them."""


@contextmanager
def computing_in(model: LanguageModel, dtype: torch.dtype) -> Generator[None]:
    """Each node's own parameters have another type while it runs, so that only one node's are there twice.

    Those of the embedding have it all the time: a tied head reads them, and caches are made in their type.
    """
    with eagerly(), ExitStack() as stack:
        for module in _units(model):
            if module is not model.embedding:
                held: Held = []
                stack.callback(module.register_forward_pre_hook(_widen(held, dtype)).remove)
                stack.callback(module.register_forward_hook(_restore(held), always_call=True).remove)
        held = []
        _widen(held, dtype)(model.embedding)
        stack.callback(_restore(held), model.embedding)
        yield


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The nodes, and what has parameters outside of them: who calls a node's maps is the node's own business."""
    for child in module.children():
        if isinstance(child, Node) or any(True for _ in child.parameters(recurse=False)):
            yield child
        yield from (unit for unit in _units(child) if not isinstance(child, Node) or isinstance(unit, Node))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """A unit and the modules inside that are no units of their own."""
    yield module
    for child in module.children():
        if not isinstance(child, Node):
            yield from _parts(child)


def _widen(held: Held, dtype: torch.dtype) -> Any:
    def widen(module: nn.Module, *_: Any) -> None:
        for part in _parts(module):
            parameters = part._parameters  # pyright: ignore[reportPrivateUsage]
            own = {name: parameter for name, parameter in parameters.items() if parameter is not None}
            held.append((parameters, own))
            parameters.update({name: nn.Parameter(p.detach().to(dtype), False) for name, p in own.items()})

    return widen


def _restore(held: Held) -> Any:
    def restore(module: nn.Module, *_: Any) -> None:
        while held:
            parameters, own = held.pop()
            parameters.update(own)

    return restore
