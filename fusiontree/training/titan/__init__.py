"""Training on torchtitan's own Trainer. Nothing else imports torchtitan.

Importing this package adapts torchtitan to this machine and to the installed torch (see `_compat`).
"""

from fusiontree.training.titan import _compat

_compat.install()

from fusiontree.training.titan.train import TrainResult, train  # noqa: E402

__all__ = ["TrainResult", "train"]
