"""Which parameters shrink by weight decay."""

from torch import nn

_STATE = frozenset({"A_log", "D", "dt_bias"})


def decayed(model: nn.Module) -> list[str]:
    """The names of matrices that map features; all other parameters are left where the data puts them.

    Not decayed are embeddings and encodings, one-dimensional parameters (gains, biases, the gates' included) and
    the states' A, D and dt of Mamba, whatever their shape (arXiv 2312.00752, its reference code).
    """
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and not _spared(name)]


def _spared(name: str) -> bool:
    steps = name.split(".")
    return steps[0] in ("embedding", "encodings") or steps[-1] in _STATE
