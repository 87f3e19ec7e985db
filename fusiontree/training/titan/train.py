"""Trains a run, from its spec to the saved model."""

import gc
import logging
import signal
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fusiontree import machine
from fusiontree.core.model import memory
from fusiontree.core.model.model import build
from fusiontree.core.model.weights import save_weights
from fusiontree.errors import FusionTreeError
from fusiontree.training.console import Console, Silent
from fusiontree.training.errors import RunError
from fusiontree.training.metrics import Listener
from fusiontree.training.output import Output
from fusiontree.training.parallel import copies, rows_at_a_time, world
from fusiontree.training.resolve import compiles, resolved
from fusiontree.training.result import TrainResult
from fusiontree.training.run import RunSpec
from fusiontree.training.stop import Stop
from fusiontree.training.titan.config import configuration
from fusiontree.training.titan.trainer import FusionTrainer


def train(run: RunSpec, *, listener: Listener | None = None) -> TrainResult:
    """Train a model, going on from the newest checkpoint in the run's directory if there is one.

    Under torchrun every process calls this; otherwise the process is a world of one. SIGINT and SIGTERM finish
    the step, write a checkpoint and end the run.

    Args:
        run: the run; see `RunSpec`.
        listener: receives progress in process 0; by default progress is printed.

    Raises:
        FusionTreeError: the run, its data or its directory cannot be used.
        TrainingFailed: the loss or a weight is not finite.
    """
    output = Output(run)
    output.check()
    with Stop().listening() as stop, world() as (rank, processes):
        told = (listener or Console()) if rank == 0 else Silent()
        run, precision = resolved(run, output.began())
        config, compiled = configuration(run, processes), compiles(run)
        _check_room(run, processes)
        config.compile.enable = compiled.value is True
        with _claimed(output, rank), _logged(output.log, rank), _threads(run.training.threads or machine.threads()):
            told.message(f"precision {precision}, compile {compiled}, threads {torch.get_num_threads()}")
            return _train(config, told, stop)


@contextmanager
def _claimed(output: Output, rank: int) -> Generator[None]:
    """Process 0 claims the directory. If it cannot, every process raises an error."""
    with ExitStack() as stack:
        problem: FusionTreeError | None = None
        if rank == 0:
            try:
                stack.enter_context(output.claimed())
            except FusionTreeError as error:
                problem = error
        refused = torch.tensor(int(problem is not None))
        dist.all_reduce(refused)
        if refused:
            raise problem or RunError(f"{output.root}: process 0 cannot have it")
        yield


def _check_room(run: RunSpec, processes: int) -> None:
    """Refuse a run that cannot fit in memory: weights, gradients, two moments, and the least a micro-batch keeps.

    Raises:
        WeightsError: the message has the bytes needed and the bytes free.
    """
    device = torch.device(machine.device_type())
    parameters = sum(p.numel() for p in build(run.model, device="meta").parameters())
    _, shards = copies(processes, run.parallelism.shard)
    memory.check_room(16 * parameters // shards, device, what="model: training it")
    rows = rows_at_a_time(run.training.rows, run.training.microbatch_rows, processes)
    kept = run.model.width * len(run.model.expanded_layers()) + run.model.vocab_size
    memory.check_room(4 * rows * run.text.length * kept, device, what=f"training: {rows} x {run.text.length} tokens")


def _train(config: FusionTrainer.Config, listener: Listener, stop: Stop) -> TrainResult:
    trainer = config.build(listener=listener, stop=stop)
    if trainer.first:
        trainer.output.begin()
    try:
        trainer.train()
    finally:
        trainer.close()
        gc.enable()  # torchtitan turns it off
    stopped = bool(stop.signal) and trainer.step < config.run.training.steps
    if not stopped:
        _write_model(trainer)
    dist.barrier()
    return _stopped(trainer) if stopped else _finished(trainer)


def _finished(trainer: FusionTrainer) -> TrainResult:
    trainer.listener.message(f"finished: {trainer.output.model}")
    return TrainResult.read("finished", trainer.output.root, steps=trainer.step)


def _stopped(trainer: FusionTrainer) -> TrainResult:
    number = trainer.stop.signal
    text = f"stopped by {signal.Signals(number).name} after step {trainer.step}; run the same command again to go on"
    trainer.listener.message(text)
    return TrainResult.read("stopped", trainer.output.root, steps=trainer.step, exit_code=128 + number)


def _write_model(trainer: FusionTrainer) -> None:
    state = trainer.model.state_dict()
    weights = {path: t.full_tensor() if isinstance(t, DTensor) else t for path, t in state.items()}
    if trainer.first:
        save_weights(trainer.run.model, weights, trainer.output.model)


@contextmanager
def _logged(path: Path, rank: int) -> Generator[None]:
    """Send log messages and Python's warnings to a file. Process 0 writes INFO and above, others WARNING and above."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {rank} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before, level, complains = root.handlers[:], root.level, logging.raiseExceptions
    logging.raiseExceptions = False  # on a full disk the report of a failed write could fail too
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
        logging.raiseExceptions = complains
        with suppress(OSError):
            handler.close()


@contextmanager
def _threads(threads: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["TrainResult", "train"]
