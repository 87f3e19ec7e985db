"""Turns torchtitan's figures of a step into fields of a record."""

import time
from dataclasses import dataclass
from typing import Any

from torchtitan.components.metrics import MetricsProcessor

from fusiontree.training.metrics import Record

GIBIBYTE = 2**30


class StepMetrics(MetricsProcessor):
    """Keeps torchtitan's figures of a step until the trainer writes them. Only the time in steps is counted."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """torchtitan's options, and the number of steps of the run."""

        steps: int

    def __init__(self, config: Config, **parts: Any) -> None:
        super().__init__(config, **parts)
        self.config: StepMetrics.Config = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.record: Record = {}
        self._seconds, self._began = 0.0, 0.0

    def begin_step(self) -> None:
        """Start the clock, and clear the record of the step before."""
        self.record, self._began = {}, time.perf_counter()

    def end_step(self) -> None:
        """Stop the clock until the next step."""
        self._seconds += time.perf_counter() - self._began

    def should_log(self, step: int) -> bool:
        """Whether to log a step: as torchtitan does, and always at the last step."""
        return super().should_log(step) or step == self.config.steps

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Record the figures of a step; torchtitan calls this at the end of a step that is logged."""
        seconds = self._seconds + time.perf_counter() - self._began
        memory = self.device_memory_monitor.get_peak_stats().max_reserved_gib
        rates = [value for key, value in (extra_metrics or {}).items() if key.startswith("lr/")]
        self.record = {
            "tokens_per_second": self.ntokens_since_last_log * self.parallel_dims.world_size / seconds,
            "memory": round(memory * GIBIBYTE),
            "learning_rate": max(rates),
            "grad_norm": grad_norm,
        }
        self.ntokens_since_last_log, self._seconds, self._began = 0, 0.0, time.perf_counter()
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()
