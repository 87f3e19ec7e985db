"""torchtitan's Trainer with objectives, gate statistics, validation, records and clean stops."""

import hashlib
import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.trainer import Trainer

from fusiontree.core.contracts.modules import scaled, total
from fusiontree.core.model.model import LanguageModel
from fusiontree.core.probes import probes
from fusiontree.core.probes.gate_statistics import Observation
from fusiontree.data import HeldOut
from fusiontree.training.errors import TrainingFailed
from fusiontree.training.gate_monitor import GateMonitor
from fusiontree.training.metrics import Listener, Metrics, Record
from fusiontree.training.objectives import CrossEntropy, StepPart
from fusiontree.training.objectives.base import captured
from fusiontree.training.output import Output
from fusiontree.training.run import RunSpec
from fusiontree.training.stop import Stop
from fusiontree.training.titan.data import refuse_changed
from fusiontree.training.validation import measure

Batch = tuple[dict[str, Tensor], Tensor]


class FusionTrainer(Trainer):
    """One process's part of a run. The loop, the optimiser and the meshes are torchtitan's."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """torchtitan's configuration, and the run that it was made from."""

        run: RunSpec

    def __init__(self, config: Config, *, listener: Listener, stop: Stop) -> None:
        self.run, self.listener, self.stop = config.run, listener, stop
        self.output = Output(self.run)
        self.metrics = Metrics(self.output.root, tensorboard=self.run.tensorboard)
        self.monitor = GateMonitor(self.run.monitor.every, self.run.training.steps)
        super().__init__(config)
        self.objectives = self.run.objectives
        self.sums = torch.zeros(1 + len(self.objectives), dtype=torch.float64, device=self.device)
        """The sums over the step so far: cross entropy, then every objective."""
        self.means = self.sums.tolist()
        model = self.model_parts[0]
        assert isinstance(model, LanguageModel)
        self.model = model
        read = any(objective.reads_gates for objective in self.objectives.values())
        self.gates = probes.gates(self.model) if read else {}
        self.held_out = self._held_out()

    def _held_out(self) -> HeldOut | None:
        if self.run.validation is None:
            return None
        return self.run.text.model_copy(update={"bytes": self._held_out_limit()}).held_out()

    def _held_out_limit(self) -> int | None:
        validation = self.run.validation
        limits = [self.run.text.bytes, None if validation is None else validation.bytes]
        return min((limit for limit in limits if limit is not None), default=None)

    def _held_out_contents(self) -> dict[str, Any] | None:
        if self.held_out is None:
            return None
        return {"limit": self._held_out_limit(), "contents": self.held_out.corpus.contents.data()}

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes the run file, the metrics, `gates.json` and the model."""
        return dist.get_rank() == 0

    def begin(self) -> None:
        """Open the metrics and report a resume. `Checkpointer` calls this once the state is loaded, before any step."""
        if self.first:
            self.metrics.start(self.step)
        if self.step:
            self.listener.message(f"going on after step {self.step}")
        self.stop.agree()

    def should_continue_training(self) -> bool:
        """Whether another step follows: steps are left, and no signal asked to stop."""
        return super().should_continue_training() and not self.stop.signal

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Run one optimiser step, write its record if there is one, and agree on whether to stop."""
        torch.manual_seed(_step_seed(self.run.seed, self.step, dist.get_rank()))
        processor: Any = self.metrics_processor
        self.sums.zero_()
        with self._observing() as observation:
            processor.begin_step()
            super().train_step(data_iterator)
            processor.end_step()
        self._check_loss()
        record = self._training_record(processor.record) | self._gate_record(observation) | self._held_out_record()
        if record:
            self._write({"step": self.step} | record)
        self.stop.agree()

    def forward_backward_step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """Run one micro-batch. Returns only the cross entropy, with NaN and infinity replaced: at those, torchtitan
        would stop this process alone, whereas `_check_loss` stops all."""
        inputs, labels, places = self.post_dataloading_process(input_dict, labels)
        with self.train_context(), captured(self.gates) as gates:
            nats = self.model.cross_entropy(inputs, labels, **places)
            part = StepPart(nats, labels, global_valid_tokens, gates)
            values = {name: objective.value(part) for name, objective in self.objectives.items()}
            self._minimised(values).backward()
        cross_entropy = CrossEntropy().value(part)
        self.sums += torch.stack([cross_entropy, *values.values()]).detach()
        return cross_entropy.detach().nan_to_num()

    def _minimised(self, values: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the objectives. Cross entropy is included even at weight 0, because it depends on every
        parameter, and every sharded parameter needs a gradient."""
        weights = {name: objective.weight for name, objective in self.objectives.items()}
        return total(
            scaled(value, weights[name]) for name, value in values.items() if weights[name] or name == "cross_entropy"
        )

    def state_dict(self) -> dict[str, Any]:
        """The state of the trainer in a checkpoint, apart from tensors."""
        return {"step": self.step, "monitor": self.monitor.state_dict(), "held_out": self._held_out_contents()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint.

        Raises:
            RunError: the held-out data has changed, although the limit on its bytes has not.
        """
        before, now = state_dict.get("held_out"), self._held_out_contents()
        if self.held_out and before and now and before["limit"] == now["limit"]:
            refuse_changed(self.held_out.corpus.contents, before["contents"])
        self.step = state_dict["step"]
        self.ntokens_seen = self._tokens() // dist.get_world_size()
        self.monitor.load_state_dict(state_dict["monitor"])

    def close(self) -> None:
        """Close the metrics, then torchtitan's Trainer."""
        self.metrics.close()
        super().close()

    def _tokens(self) -> int:
        return self.step * self.run.training.rows * self.run.text.length

    @contextmanager
    def _observing(self) -> Generator[Observation | None]:
        with ExitStack() as stack:
            due = self.monitor.due(self.step)
            yield stack.enter_context(probes.observe(self.model)) if due else None

    def _check_loss(self) -> None:
        """Sum the terms of the step over all processes; every process stops if one of the sums is not finite."""
        dist.all_reduce(self.sums)
        self.means = self.sums.tolist()
        if not all(math.isfinite(mean) for mean in self.means):
            raise TrainingFailed(f"step {self.step}: the loss is {self.means[0]}")

    def _training_record(self, found: Record) -> Record:
        if not found:
            return {}
        loss, *values = self.means
        named = dict(zip(self.objectives, values, strict=True))
        said = {"objectives": named} if list(named) != ["cross_entropy"] else {}
        return {"loss": loss, "bits_per_byte": loss / math.log(2), **said, "tokens": self._tokens()} | found

    def _gate_record(self, observation: Observation | None) -> Record:
        if not observation:
            return {}
        gates = self.monitor.add(observation)
        if self.first:
            self.monitor.write(self.output.gates, self.step, self.run.model.digest())
        brief = {p: {b: {"mean": s.mean, "std": s.std} for b, s in gate.items()} for p, gate in gates.items()}
        return {"gates": brief}

    def _held_out_record(self) -> Record:
        validation = self.run.validation
        last = self.step == self.run.training.steps
        if validation is None or self.held_out is None or not (last or self.step % validation.every == 0):
            return {}
        score = measure(self.model, self.held_out, rows=validation.rows, device=self.device)
        if not math.isfinite(score.loss):
            raise TrainingFailed(f"step {self.step}: the held-out loss is {score.loss}")
        return {"validation_loss": score.loss, "validation_bits_per_byte": score.bits_per_byte}

    def _write(self, record: Record) -> None:
        if self.first:
            self.metrics.write(record)
            self.listener.record(record, self.run.training.steps)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all noise of one step in one process. It makes a step the same after a resume."""
    digest = hashlib.sha256(f"noise:{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
