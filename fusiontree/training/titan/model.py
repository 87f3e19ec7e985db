"""`LanguageModel` behind torchtitan's model interface; the paths of its parameters do not change."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModel

from fusiontree.core.model.initialise import initialise
from fusiontree.core.model.model import LanguageModel
from fusiontree.core.model.spec import ModelSpec
from fusiontree.training.parallel import shard


class TitanModel(LanguageModel, BaseModel):
    """A `LanguageModel` that torchtitan builds on the meta device, shards, and then initialises."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """The spec, and the seed of the starting weights."""

        spec: ModelSpec
        seed: int

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Does nothing, because the model does not depend on the training configuration."""

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and the usual 6 FLOPs a token for each; our own metrics do not use them."""
            parameters = sum(p.numel() for p in model.parameters())
            return parameters, 6 * parameters

    def __init__(self, config: Config) -> None:
        LanguageModel.__init__(self, config.spec)
        self.config = config

    def verify_module_protocol(self) -> None:
        """Skip torchtitan's check, because the modules of the model are plain torch modules."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Draw every parameter from (seed, path): the same on any number of processes."""
        initialise(self, self.config.seed)


def parallelize(
    model: TitanModel,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    compile_config: CompileConfig,
    **unused: Any,
) -> TitanModel:
    """Compile if asked, then shard. There are several copies if `parallelism.shard` is below the process count."""
    if compile_config.enable:
        model.compile()
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    return shard(model, parallel_dims.get_mesh(names), precision=training.mixed_precision_param)
