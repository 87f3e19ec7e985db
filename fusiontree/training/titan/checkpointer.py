"""Our checkpoints behind torchtitan's checkpoint manager."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torchtitan.components.checkpointer.base import BaseCheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer

from fusiontree.training.checkpoint import Checkpoints

if TYPE_CHECKING:
    from fusiontree.training.titan.trainer import FusionTrainer


class Checkpointer(BaseCheckpointManager):
    """Saves every so many steps, at the last one, and when the run is asked to stop."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        """The directory of the checkpoints, the digest of their run, and how many to keep."""

        directory: Path
        run: str
        keep: int

    def __init__(
        self,
        config: Config,
        *,
        model_parts: list[nn.Module],
        optimizers: "OptimizersContainer[Any]",
        lr_schedulers: LRSchedulersContainer,
        dataloader: BaseDataLoader,
        states: dict[str, Any],
        **unused: Any,
    ) -> None:
        self.enable, self.save_future = True, None
        self.checkpoints = Checkpoints(config.directory, run=config.run, keep=config.keep)
        self.interval = config.interval
        self.model, self.optimizers = model_parts[0], optimizers
        self.trainer: FusionTrainer = states["train_state"]
        self.others: dict[str, Any] = {"schedule": lr_schedulers, "data": dataloader, "trainer": self.trainer}

    def tensors(self) -> dict[str, Tensor]:
        """The weights and the tensors of the optimiser's state, by path; not copies."""
        weights = {f"model.{path}": tensor for path, tensor in self.model.state_dict().items()}
        moments = {f"optimizer.{path}": value for path, value in self._moments().items() if isinstance(value, Tensor)}
        return weights | moments

    def _moments(self) -> dict[str, Any]:
        return self.optimizers.state_dict()

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not (last_step or self.trainer.stop.signal or curr_step % self.interval == 0):
            return False
        state = {name: part.state_dict() for name, part in self.others.items()}
        self.checkpoints.save(curr_step, self.tensors(), state)
        return True

    def _load(self, step: int = -1) -> bool:
        self.checkpoints.clean()
        steps = self.checkpoints.steps()
        if steps:
            moments = self._moments()
            state = self.checkpoints.load(steps[-1], self.tensors())
            self.optimizers.load_state_dict(moments)
            for name, part in self.others.items():
                part.load_state_dict(state[name])
            _set_rates(self.others["schedule"])
        self.trainer.begin()
        return bool(steps)

    def _maybe_wait_for_staging(self) -> None:
        """Does nothing, because `_save` stages nothing."""

    def _wait_for_saving(self) -> None:
        """Does nothing, because `_save` does not return before the checkpoint is written."""

    def _close(self) -> None:
        """Does nothing, because nothing runs in the background."""


def _set_rates(schedulers: Iterable[Any]) -> None:
    """Copy the learning rate of the restored step into the optimiser's parameter groups."""
    for scheduler in schedulers:
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
