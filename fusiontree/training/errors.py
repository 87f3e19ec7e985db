"""The errors of training: bad input, and a job that failed."""

from fusiontree.errors import FusionTreeError


class RunError(FusionTreeError):
    """A run file, an output directory or a world size that does not fit: exit code 2."""


class TrainingFailed(RuntimeError):
    """A run that cannot go on, such as a loss that is not finite: exit code 1."""
