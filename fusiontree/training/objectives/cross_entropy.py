"""Cross entropy: the mean negative log-likelihood of the labels."""

from typing import Literal

from fusiontree.training.objectives.base import ObjectiveSpec, Scalar, StepPart, objectives


@objectives.register
class CrossEntropy(ObjectiveSpec):
    """Nats per label."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def value(self, part: StepPart) -> Scalar:
        """The nats of these rows, divided by the number of labels in the step."""
        return part.nats / part.count
