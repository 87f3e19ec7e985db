"""The recurrence of RG-LRU (Griffin, arXiv 2402.19427) and of HGRN (arXiv 2311.04823), without their gates."""

from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.scan.linear import reference, two_level  # noqa: F401  (they register)
from fusiontree.kernels.scan.linear.op import LINEAR_RECURRENCE, LinearRecurrenceInputs


def linear_recurrence(
    x: Float[Tensor, "batch time channels"],
    a: Float[Tensor, "batch time channels"],
    *,
    initial_state: Float[Tensor, "batch channels"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels"]]:
    """h_t = a_t h_{t-1} + x_t, each channel by itself.

    Returns h in x's dtype, and the state after each row's last real token in float32 (float64 for float64).
    Differentiable in all floating-point arguments, through both results.

    Args:
        x: what is added.
        a: what is kept, in [0, 1], both ends included; in float32, where so much of it is next to 1.
        initial_state: the state before the first token; None is zeros.
        segments: document boundaries, as in `fusiontree.kernels.documents`.
        backend: "auto" or one of `LINEAR_RECURRENCE.backends`.

    Raises:
        FusionTreeError: shapes that do not agree.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    return LINEAR_RECURRENCE(LinearRecurrenceInputs(x, a, initial_state, segments), backend)


def linear_recurrence_step(
    state: Float[Tensor, "batch channels"], x: Float[Tensor, "batch channels"], a: Float[Tensor, "batch channels"]
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]:
    """One token of `linear_recurrence`, for decoding without gradients: `state` is updated in place and returned."""
    state.mul_(a).add_(x)
    return state.to(x.dtype, copy=True), state
