"""Supplies what torchtitan 0.3 assumes but a machine without a GPU, or an older torch, does not have.

torchtitan 0.3.0 was cut for torch 2.14 and CUDA. `install` runs before any other of its modules is imported,
because they bind names at import. Each patch checks whether it is needed; with a GPU and torch 2.14 none is.
"""

import importlib.util
import os
import platform
import resource
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp

from fusiontree.training.errors import RunError

_EXPERT_PARALLEL = "torchtitan.distributed.minimal_async_ep"


def install() -> None:
    """Make torchtitan importable and runnable here.

    Raises:
        RunError: torchtitan is not installed.
    """
    if importlib.util.find_spec("torchtitan") is None:
        raise RunError('training needs torchtitan, which is not installed: pip install "fusiontree[train]"')
    _set_timeout()
    _mesh_dims()
    _no_triton()
    if not torch.cuda.is_available():
        _cpu()


def _set_timeout() -> None:
    """Define `dist.set_timeout`, which is private before torch 2.14."""
    if not hasattr(dist, "set_timeout"):
        from torch.distributed.distributed_c10d import _set_pg_timeout  # pyright: ignore[reportPrivateUsage]

        dist.__dict__["set_timeout"] = lambda timeout, group=None: _set_pg_timeout(timeout, group)


def _mesh_dims() -> None:
    """Define `DataParallelMeshDims`, new in torch 2.12; torchtitan imports it for a back end not used here."""
    if not hasattr(fsdp, "DataParallelMeshDims"):
        fsdp.__dict__["DataParallelMeshDims"] = _DataParallelMeshDims


@dataclass
class _DataParallelMeshDims:
    shard: Any = None
    replicate: Any = None


def _no_triton() -> None:
    """Replace an optional module for mixtures of experts: it imports triton, which CPU builds of torch lack."""
    if importlib.util.find_spec("triton") is not None or _EXPERT_PARALLEL in sys.modules:
        return
    package, api = types.ModuleType(_EXPERT_PARALLEL), types.ModuleType(f"{_EXPERT_PARALLEL}.api")
    names: dict[str, Any] = {name: _needs_triton for name in ("combine_op", "dispatch_op", "init_buffer")}
    names["maybe_update_minimal_async_ep_config"] = lambda *args, **options: None
    names["MinimalAsyncEPDispatchMetadata"] = type("MinimalAsyncEPDispatchMetadata", (), {})
    for module in (package, api):
        vars(module).update(names)
        sys.modules[module.__name__] = module
    vars(package).update(api=api, __path__=[])


def _needs_triton(*args: object, **options: object) -> None:
    raise RuntimeError("this part of torchtitan needs triton")


def _cpu() -> None:
    """Without an accelerator torchtitan assumes CUDA; give it the CPU as a device."""
    import torchtitan.tools.utils as utils

    assert "torchtitan.trainer" not in sys.modules, "torchtitan was imported before fusiontree.training.titan"
    utils.device_type, utils.device_module = "cpu", CPU()


class CPU(types.ModuleType):
    """The CPU as a device, with the functions of `torch.cuda` that torchtitan calls."""

    def __init__(self) -> None:
        super().__init__("cpu_as_a_device")

    def is_available(self) -> bool:
        """The CPU is always available."""
        return True

    def set_device(self, device: object) -> None:
        """Does nothing: there is one device."""

    def current_device(self) -> int:
        """The index of the only device."""
        return 0

    def device_count(self) -> int:
        """The number of devices."""
        return 1

    def synchronize(self, device: object = None) -> None:
        """Does nothing: no work is asynchronous."""

    def get_device_name(self, device: object = None) -> str:
        """The name of the device, with the processor's architecture."""
        return f"CPU ({platform.machine()})"

    def get_device_properties(self, device: object = None) -> types.SimpleNamespace:
        """The name of the device and its memory in bytes."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(name="CPU", total_memory=total)

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Does nothing: the operating system cannot reset the peak."""

    def empty_cache(self) -> None:
        """Does nothing: there is no cache."""

    def memory_stats(self, device: object = None) -> dict[str, int]:
        """The peak of the resident set in bytes."""
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = kibibytes * (1 if sys.platform == "darwin" else 1024)
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }
