"""Numbers of a spec as tensors on a device."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "values"]:
    """The numbers as a read-only tensor, made once for each dtype and device, because a copy to a device synchronises
    it. Not a module's buffer: a change of dtype would round it."""
    if torch.compiler.is_compiling():  # a compiler keeps constants by itself
        return torch.tensor(values, dtype=dtype, device=device)
    return kept(tuple(values), dtype, device)  # an operator that is not traced gets a list


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may be met again in training
def kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "values"]:
    """Those that a process has met."""
    return torch.tensor(values, dtype=dtype, device=device)
