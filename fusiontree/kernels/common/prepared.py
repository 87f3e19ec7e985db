"""What every backend of a scan is given."""

from typing import Any, TypeVar

from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype, silence_padding

InputsT = TypeVar("InputsT", bound=Any)


def prepared(inputs: InputsT) -> InputsT:
    """The call of `ssd` or `selective_scan` with dt, A and the state in the accumulation dtype, and dt = 0 at padding.

    A token with dt = 0 leaves the state alone and adds nothing to it, so that padding needs no other care than
    silence in the outputs.
    """
    dtype = accumulation_dtype(inputs.x.dtype)
    start: Tensor | None = inputs.initial_state
    state = inputs.x.new_zeros(inputs.state_shape, dtype=dtype) if start is None else start.to(dtype)
    dt = silence_padding(inputs.dt.to(dtype), inputs.segments)
    return inputs._replace(dt=dt, A=inputs.A.to(dtype), initial_state=state)
