"""Document boundaries, with one meaning for every operator.

`segments` numbers the documents of a row: nondecreasing from 0 on, a new number is a new document, -1 is
padding at the end. Segment 0 continues what came before the call (a state, cached keys); every other
segment starts from nothing. None is one document that continues, without padding.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PADDING = -1


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states, decays and softmax are kept in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def real(segments: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """Which tokens are not padding."""
    return segments != PADDING


def padding_joined(segments: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Count padding to the last document of its row (to segment 0 in a row of nothing else)."""
    return segments.cummax(dim=1).values.clamp(min=0)


def previous(segments: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """The segment of the token before each token; what came before the call is segment 0."""
    return torch.cat([torch.zeros_like(segments[:, :1]), segments[:, :-1]], dim=1)


def silence_padding(
    values: Float[Tensor, "batch time *features"], segments: Int[Tensor, "batch time"] | None
) -> Float[Tensor, "batch time *features"]:
    """Zeros where there is padding, in the values and in their gradients."""
    if segments is None:
        return values
    kept = real(segments).reshape(*segments.shape, *(1 for _ in values.shape[2:]))
    return torch.where(kept, values, values.new_zeros(()))
