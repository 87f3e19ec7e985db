"""`linear_recurrence` for one new token of each row."""

from jaxtyping import Float
from torch import Tensor


def linear_recurrence_step(
    state: Float[Tensor, "batch channels"], x: Float[Tensor, "batch channels"], a: Float[Tensor, "batch channels"]
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]:
    """One token of `linear_recurrence`, for decoding without gradients: `state` is updated in place and returned."""
    state.mul_(a).add_(x)
    return state.to(x.dtype, copy=True), state
