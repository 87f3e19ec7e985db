"""Numbers of a spec as tensors on a device."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "values"]:
    """These numbers as a tensor that nobody may write to, made once for each type and device: a device has to be waited
    for to copy some there. No buffer of a module, which a change of type would round."""
    if torch.compiler.is_compiling():  # a compiler keeps constants by itself
        return torch.tensor(values, dtype=dtype, device=device)
    return kept(tuple(values), dtype, device)  # an operator that is not traced gets a list


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may be met again in training
def kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "values"]:
    """Those that a process has met."""
    return torch.tensor(values, dtype=dtype, device=device)
