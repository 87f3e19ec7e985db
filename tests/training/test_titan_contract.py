"""Every name and signature of torchtitan 0.3 that we use; where an upgrade breaks us, it breaks here first."""

import dataclasses
import importlib
import inspect
from typing import Any

import pytest
import torch
import training_runs as runs
from hypothesis import given, settings
from hypothesis import strategies as st

import fusiontree.training.titan as titan
from fusiontree.training import OptimizerSpec, RunSpec, TrainingSpec
from fusiontree.training.sections import ResolvedSpec

FIELDS = {
    "trainer.Trainer.Config": [
        "activation_checkpoint",
        "checkpoint",
        "comm",
        "dataloader",
        "debug",
        "dump_folder",
        "loss",
        "lr_scheduler",
        "metrics",
        "model_spec",
        "optimizer",
        "parallelism",
        "tokenizer",
        "training",
        "validator",
    ],
    "components.checkpointer.base.BaseCheckpointManager.Config": [
        "enable",
        "initial_load_model_only",
        "interval",
        "last_save_model_only",
    ],
    "components.loss.CrossEntropyLoss.Config": [],
    "components.metrics.MetricsProcessor.Config": ["disable_color_printing", "log_freq"],
    "components.optimizer.LRSchedulersContainer.Config": [
        "decay_ratio",
        "decay_type",
        "min_lr_factor",
        "total_steps",
        "warmup_steps",
    ],
    "components.optimizer.OptimizersContainer.Config": ["implementation", "param_groups"],
    "components.optimizer.ParamGroupConfig": ["optimizer_kwargs", "optimizer_name", "pattern"],
    "components.tokenizer.BaseTokenizer.Config": [],
    "components.dataloader.BaseDataLoader.Config": [],
    "components.validate.Validator.Config": ["enable"],
    "config.ParallelismConfig": ["data_parallel_replicate_degree", "data_parallel_shard_degree", "spmd_backend"],
    "config.TrainingConfig": [
        "disable_cuda_graphs",
        "global_batch_size",
        "local_batch_size",
        "max_norm",
        "mixed_precision_param",
        "seq_len",
        "steps",
    ],
    "config.configs.CommConfig": ["init_timeout_seconds", "trace_buf_size", "train_timeout_seconds"],
    "config.configs.DebugConfig": ["enable_structured_logging", "seed"],
    "protocols.ModelSpec": [
        "flavor",
        "model",
        "name",
        "parallelize_fn",
        "pipelining_fn",
        "post_optimizer_build_fn",
        "state_dict_adapter",
    ],
    "protocols.BaseModel.Config": [],
}

SIGNATURES = {
    "trainer.Trainer.__init__": ["config"],
    "trainer.Trainer.train": [],
    "trainer.Trainer.train_step": ["data_iterator"],
    "trainer.Trainer.forward_backward_step": ["input_dict", "labels", "global_valid_tokens"],
    "trainer.Trainer.post_dataloading_process": ["input_dict", "labels"],
    "trainer.Trainer.should_continue_training": [],
    "trainer.Trainer.state_dict": [],
    "trainer.Trainer.load_state_dict": ["state_dict"],
    "trainer.Trainer.close": [],
    "components.checkpointer.base.BaseCheckpointManager._load": ["step"],
    "components.checkpointer.base.BaseCheckpointManager._save": ["curr_step", "last_step"],
    "components.checkpointer.base.BaseCheckpointManager._maybe_wait_for_staging": [],
    "components.checkpointer.base.BaseCheckpointManager._wait_for_saving": [],
    "components.checkpointer.base.BaseCheckpointManager._close": [],
    "components.metrics.MetricsProcessor.log": [
        "step",
        "global_avg_loss",
        "global_max_loss",
        "grad_norm",
        "extra_metrics",
    ],
    "components.optimizer.OptimizersContainer.state_dict": [],
    "components.optimizer.OptimizersContainer.load_state_dict": ["state_dict"],
    "components.optimizer.LRSchedulersContainer.state_dict": [],
    "components.optimizer.LRSchedulersContainer.load_state_dict": ["state_dict"],
    "distributed.ParallelDims.get_mesh": ["dims"],
    "protocols.BaseModel.verify_module_protocol": [],
    "protocols.BaseModel.init_states": ["buffer_device"],
    "protocols.BaseModel.Config.update_from_config": ["config", "kwargs"],
    "protocols.BaseModel.Config.get_nparams_and_flops": ["model", "seq_len"],
}

BUILT_WITH = {
    "dataloader": {"dp_world_size", "dp_rank", "local_batch_size"},
    "checkpoint": {"dataloader", "model_parts", "optimizers", "lr_schedulers", "states"},
    "metrics": {"parallel_dims"},
    "tokenizer": {"tokenizer_path"},
}


def find(path: str) -> Any:
    """What `a.b.Class.method` names below torchtitan."""
    steps = path.split(".")
    for cut in range(len(steps) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["torchtitan", *steps[:cut]]))
        except ModuleNotFoundError:
            continue
        for step in steps[cut:]:
            found = getattr(found, step)
        return found
    raise AssertionError(path)


@pytest.mark.parametrize("path", FIELDS)
def test_configurations_have_the_fields_that_we_set(path):
    assert {field.name for field in dataclasses.fields(find(path))} >= set(FIELDS[path])


@pytest.mark.parametrize("path", SIGNATURES)
def test_methods_take_what_we_give_and_what_we_override(path):
    assert [name for name in inspect.signature(find(path)).parameters if name != "self"] == SIGNATURES[path]


@pytest.mark.parametrize("part", BUILT_WITH)
def test_the_trainer_builds_our_parts_with_what_they_take(part):
    source = inspect.getsource(find("trainer.Trainer.__init__"))
    call = source.split(f"config.{part}.build(", 1)[1].split("\n        )", 1)[0]
    assert all(f"{name}=" in call for name in BUILT_WITH[part])


def test_our_own_configurations_are_accepted(data, tmp_path):
    run = runs.spec(data, tmp_path).model_copy(update={"resolved": ResolvedSpec(precision="bfloat16")})
    config = titan.train.__globals__["configuration"](run, 2)
    assert isinstance(config, find("trainer.Trainer.Config"))
    assert config.training.local_batch_size == 2
    assert config.parallelism.data_parallel_shard_degree == 2
    assert config.training.mixed_precision_param == "bfloat16"
    assert "run" in config.to_dict()


def rates(steps: int, warmup: int, decay: float, minimum: float) -> list[float]:
    """The rate of each step, and what is set after the last, from torchtitan's own schedule as we set it up."""
    from fusiontree.training.titan.config import schedule

    section = OptimizerSpec(learning_rate=1.0, warmup=warmup, decay=decay, minimum=minimum)
    run = RunSpec.model_construct(training=TrainingSpec(steps=steps, rows=1), optimizer=section)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    container = schedule(run).build(optimizers=[optimizer], training_steps=steps)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        container.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@given(st.integers(1, 30), st.integers(0, 40), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_the_learning_rate_is_never_negative_nor_above_the_top(steps, warmup, decay, minimum):
    found = rates(steps, warmup, decay, minimum)
    assert all(0 <= rate <= 1 for rate in found)
    rising = found[: min(warmup, steps)]
    assert rising == sorted(rising)
    assert found[min(warmup, steps) :] == sorted(found[min(warmup, steps) :], reverse=True)


def test_the_learning_rate_follows_its_three_parts():
    found = rates(10, 2, 0.5, 0.2)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36, 0.2])
