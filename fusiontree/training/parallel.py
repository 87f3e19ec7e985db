"""How processes share a model: plain functions of a module and a device mesh, for any training loop."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from fusiontree import machine
from fusiontree.training.errors import RunError

M = TypeVar("M", bound=nn.Module)
TIMEOUT = timedelta(minutes=30)
"""How long processes wait for each other: longer than a validation in one process takes."""


def shard(module: M, mesh: DeviceMesh, *, precision: Literal["float32", "bfloat16"]) -> M:
    """Spread a language model's parameters over a mesh, layer by layer, in place (FSDP2, arXiv 2304.11277).

    Layers compute in `precision`; parameters, gradient sums and the optimiser stay float32. Gradients are summed,
    not averaged, because the loss is already divided by the labels of the whole step. A mesh of two dimensions
    replicates over the first.
    """
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, precision), reduce_dtype=torch.float32)
    layers = module.get_submodule("layers")
    for layer in layers.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(module, "cross_entropy")
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            # gloo lacks the scaled sum that FSDP would use; with a factor of 1 a plain sum gives the same result
            part.set_force_sum_reduction_for_comms(True)
    return module


def copies(processes: int, sharded: int) -> tuple[int, int]:
    """Returns (number of copies of the weights, number of processes that share one copy).

    Raises:
        RunError: the number to shard over does not divide the processes.
    """
    sharded = processes if sharded == -1 else sharded
    if processes % sharded:
        raise RunError(f"parallelism.shard: expected a divisor of the {processes} processes, found {sharded}")
    return processes // sharded, sharded


def rows_at_a_time(rows: int, microbatch_rows: int | None, processes: int) -> int:
    """How many of a step's rows each process runs at once.

    Raises:
        RunError: the rows cannot be dealt out evenly.
    """
    if rows % processes:
        raise RunError(f"training.rows: expected a multiple of the {processes} processes, found {rows}")
    share = rows // processes
    part = share if microbatch_rows is None else microbatch_rows
    if share % part:
        text = f"expected a divisor of the {share} rows of each of {processes} processes, found {part}"
        raise RunError(f"training.microbatch_rows: {text}")
    return part


@contextmanager
def world() -> Generator[tuple[int, int]]:
    """Join the processes that torchrun started, or be the only one; yields (rank, processes).

    Raises:
        FusionTreeError: torchrun's environment variables are not valid, or the processes cannot join.
    """
    alone, said = "WORLD_SIZE" not in os.environ, "LOCAL_RANK" in os.environ
    rank, processes = (0, 1) if alone else (machine.launched("RANK", 0), machine.launched("WORLD_SIZE", 1, least=1))
    if torch.cuda.is_available():
        torch.cuda.set_device(machine.launched("LOCAL_RANK", 0) % torch.cuda.device_count())
    _join(alone)
    os.environ.setdefault("LOCAL_RANK", "0")  # torchtitan looks there for its device
    try:
        yield rank, processes
    finally:
        dist.destroy_process_group()
        if not said:  # other libraries take this variable as a sign of torchrun
            del os.environ["LOCAL_RANK"]


def _join(alone: bool) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.HashStore() if alone else None  # pyright: ignore[reportPrivateImportUsage]
    place: dict[str, Any] = {"store": store, "rank": 0, "world_size": 1} if alone else {}
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, **place)
    except (ValueError, RuntimeError) as error:
        raise RunError(f"the processes cannot join: {str(error).strip().splitlines()[0]:.200}") from None
