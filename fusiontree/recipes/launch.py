"""Starts several training processes on one machine, as torchrun does, but with FusionTree's messages and exit codes."""

import logging
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from uuid import uuid4

from fusiontree import machine


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m fusiontree.recipes.train` with the arguments in several processes; returns their exit code.

    Each process has its share of the cores. SIGINT and SIGTERM are passed on to the processes, which finish their
    step, write a checkpoint and end.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    command = elastic_launch(config, sys.executable)
    with _shared_cores(processes), _silent("torch.distributed.elastic", "torch.distributed.launcher"):
        try:
            command("-m", "fusiontree.recipes.train", *arguments)
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return failure.exitcode if failure.exitcode > 0 else 1
    return 0


@contextmanager
def _shared_cores(processes: int) -> Generator[None]:
    """Set the number of threads per process, unless the user has set it."""
    if machine.threads_are_set():
        yield
        return
    found = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(max(1, machine.cores() // processes))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if found is not None:
            os.environ["OMP_NUM_THREADS"] = found


@contextmanager
def _silent(*names: str) -> Generator[None]:
    """Silence loggers while a block runs, because failed processes print their own errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
