"""Starting values that depend on (seed, path) alone: not on world size, build order or other components."""

import hashlib
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.core.contracts.modules import Module
from fusiontree.errors import FusionTreeError


def generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator for one parameter."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give everything declared its starting value, in place; sharded (DTensor) parameters get their shards of it."""
    for prefix, module in model.named_modules():
        start(module, prefix, seed)


@torch.no_grad()
def start(module: nn.Module, prefix: str, seed: int, *, but: Container[str] = ()) -> None:
    """Initialise the parameters that one module declares, except the names in `but`; `prefix` is its path."""
    for name, parameter in own(module):
        if not isinstance(module, Module):
            found = f"{prefix}: {type(module).__name__} has parameters but does not say how they start"
            raise FusionTreeError(f"{found}; use fusiontree.components.LinearModule, or `declare` of its Module")
        if name not in but:
            path = f"{prefix}.{name}" if prefix else name
            value = torch.empty(parameter.shape, dtype=torch.float32)
            module.initial[name](value, generator(seed, path))
            _fill(parameter, value)


def own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters, and those of its buffers that are declared."""
    yield from module.named_parameters(recurse=False)
    if isinstance(module, Module):
        yield from ((name, each) for name, each in module.named_buffers(recurse=False) if name in module.initial)


def _fill(parameter: Tensor, value: Tensor) -> None:
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if hasattr(parameter, "device_mesh"):
        _fill_shards(parameter, value)
    else:
        parameter.copy_(value)


def _fill_shards(parameter: Any, value: Tensor) -> None:
    """Fill a DTensor. Its module takes a second to import, so it is imported only if a DTensor exists."""
    from torch.distributed.tensor import distribute_tensor

    shards: Any = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(shards.to_local())
