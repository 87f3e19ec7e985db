"""Training: the spec of a run, its objectives and its records. Only `fusiontree.training.titan` needs torchtitan."""

from fusiontree.training.console import Console, Silent
from fusiontree.training.errors import RunError, TrainingFailed
from fusiontree.training.gate_monitor import GateMonitor
from fusiontree.training.metrics import Listener, Record
from fusiontree.training.result import TrainResult
from fusiontree.training.run import RunSpec
from fusiontree.training.sections import (
    CheckpointSpec,
    EverySpec,
    OptimizerSpec,
    ParallelismSpec,
    TrainingSpec,
    ValidationSpec,
)

__all__ = [
    "CheckpointSpec",
    "Console",
    "EverySpec",
    "GateMonitor",
    "Listener",
    "OptimizerSpec",
    "ParallelismSpec",
    "Record",
    "RunError",
    "RunSpec",
    "Silent",
    "TrainResult",
    "TrainingFailed",
    "TrainingSpec",
    "ValidationSpec",
]
