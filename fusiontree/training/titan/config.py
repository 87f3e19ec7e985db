"""Translates a run to torchtitan's configuration."""

import re
from typing import Any

from torchtitan.components.checkpointer.base import BaseCheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.validate import Validator
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CommConfig, CompileConfig, DebugConfig
from torchtitan.protocols import ModelSpec as TitanModelSpec

from fusiontree.core.model.model import build
from fusiontree.training.decay import decayed
from fusiontree.training.output import Output
from fusiontree.training.parallel import TIMEOUT, copies, rows_at_a_time
from fusiontree.training.run import RunSpec
from fusiontree.training.titan.checkpointer import Checkpointer
from fusiontree.training.titan.data import TitanLoader, TitanTokenizer
from fusiontree.training.titan.metrics import StepMetrics
from fusiontree.training.titan.model import TitanModel, parallelize
from fusiontree.training.titan.trainer import FusionTrainer


def configuration(run: RunSpec, processes: int) -> FusionTrainer.Config:
    """The configuration of the Trainer in each of `processes` processes.

    Raises:
        RunError: the rows or the shards do not divide evenly over the processes.
    """
    output = Output(run)
    seconds = int(TIMEOUT.total_seconds())
    return FusionTrainer.Config(
        run=run,
        dump_folder=str(output.root),
        model_spec=_model(run),
        tokenizer=TitanTokenizer.Config(),
        dataloader=TitanLoader.Config(text=run.text, rows=run.training.rows, seed=run.seed),
        loss=CrossEntropyLoss.Config(),
        optimizer=optimizer(run),
        lr_scheduler=schedule(run),
        training=_training(run, processes),
        compile=CompileConfig(components=["model"]),
        parallelism=_parallelism(run, processes),
        checkpoint=_checkpoint(run, output),
        activation_checkpoint=None,
        metrics=StepMetrics.Config(log_freq=run.log.every, disable_color_printing=True, steps=run.training.steps),
        validator=Validator.Config(enable=False),
        comm=CommConfig(init_timeout_seconds=seconds, train_timeout_seconds=seconds, trace_buf_size=0),
        debug=DebugConfig(seed=run.seed, enable_structured_logging=False),
    )


def optimizer(run: RunSpec) -> OptimizersContainer.Config:
    """AdamW over two groups of parameters, with and without weight decay; an empty group is left out."""
    names = [name for name, _ in build(run.model, device="meta").named_parameters()]
    shrinking = set(decayed(build(run.model, device="meta")))
    common: dict[str, Any] = {"lr": run.optimizer.learning_rate, "betas": run.optimizer.betas, "eps": run.optimizer.eps}
    groups = [
        ([name for name in names if name in shrinking], run.optimizer.weight_decay),
        ([name for name in names if name not in shrinking], 0.0),
    ]
    configs = [
        ParamGroupConfig(
            pattern=f"^(?:{'|'.join(map(re.escape, group))})$",
            optimizer_name="AdamW",
            optimizer_kwargs=common | {"weight_decay": weight_decay},
        )
        for group, weight_decay in groups
        if group
    ]
    return OptimizersContainer.Config(param_groups=configs, implementation="fused")


def schedule(run: RunSpec) -> LRSchedulersContainer.Config:
    """Warmup, flat part, linear decay. It ends with the run, because torchtitan's rate is negative after the end."""
    return LRSchedulersContainer.Config(
        warmup_steps=run.optimizer.warmup,
        total_steps=run.training.steps,
        decay_ratio=run.optimizer.decay,
        decay_type="linear",
        min_lr_factor=run.optimizer.minimum,
    )


def _model(run: RunSpec) -> TitanModelSpec:
    return TitanModelSpec(
        name="fusiontree",
        flavor=run.model.digest(),
        model=TitanModel.Config(spec=run.model, seed=run.seed),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )


def _training(run: RunSpec, processes: int) -> TrainingConfig:
    training = run.training
    assert run.resolved is not None
    return TrainingConfig(
        local_batch_size=rows_at_a_time(training.rows, training.microbatch_rows, processes),
        global_batch_size=training.rows,
        seq_len=run.text.length,
        max_norm=training.clip,
        steps=training.steps,
        mixed_precision_param=run.resolved.precision,
        disable_cuda_graphs=True,
    )


def _parallelism(run: RunSpec, processes: int) -> ParallelismConfig:
    replicas, shards = copies(processes, run.parallelism.shard)
    return ParallelismConfig(
        data_parallel_replicate_degree=replicas, data_parallel_shard_degree=shards, spmd_backend="partial_dtensor"
    )


def _checkpoint(run: RunSpec, output: Output) -> BaseCheckpointManager.Config:
    return Checkpointer.Config(
        enable=True,
        directory=output.checkpoints,
        run=run.digest(),
        interval=run.checkpoint.every,
        keep=run.checkpoint.keep,
        initial_load_model_only=False,
        last_save_model_only=False,
    )
