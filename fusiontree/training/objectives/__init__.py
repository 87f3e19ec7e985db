"""Objectives: the terms of the loss, one file each."""

from fusiontree.training.objectives.balance import Balance
from fusiontree.training.objectives.base import AnyObjective, GateValues, ObjectiveSpec, StepPart, objectives
from fusiontree.training.objectives.cross_entropy import CrossEntropy
from fusiontree.training.objectives.entropy import Entropy

__all__ = [
    "AnyObjective",
    "Balance",
    "CrossEntropy",
    "Entropy",
    "GateValues",
    "ObjectiveSpec",
    "StepPart",
    "objectives",
]
