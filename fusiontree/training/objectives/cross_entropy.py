"""Cross entropy: how surprised the model is by the labels."""

from typing import Literal

from fusiontree.training.objectives.base import ObjectiveSpec, Scalar, StepPart, objectives


@objectives.register
class CrossEntropy(ObjectiveSpec):
    """Nats per label."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def value(self, part: StepPart) -> Scalar:
        """The nats of the rows' labels by the labels of the step."""
        return part.nats / part.count
