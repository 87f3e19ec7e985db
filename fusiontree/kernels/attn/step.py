"""`attention_step`: attention for one new token of each row, over cached keys that its own has joined."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.attn.blocks import FLASH_CPU, PRODUCT, Block, BlockKernel, flash_refusal
from fusiontree.kernels.attn.op import Folding, per_head
from fusiontree.kernels.constants import constants
from fusiontree.kernels.documents import wide
from fusiontree.kernels.registry import Op
from fusiontree.kernels.shapes import Shapes


class StepRequest(NamedTuple):
    """What is asked of a backend of `attention_step`."""

    device: str
    dtype: torch.dtype
    softcap: bool
    equal_widths: bool
    slopes: bool = False


class Falling(NamedTuple):
    """How scores fall: for each query head by its slope times the `distance`, in tokens from the key in a filled slot
    to the query."""

    slopes: tuple[float, ...]
    distance: Int[Tensor, "batch slots"]


class StepInputs(NamedTuple):
    """The arguments of `attention_step`."""

    q: Float[Tensor, "batch heads head_dim"]
    keys: Float[Tensor, "batch kv_heads slots head_dim"]
    values: Float[Tensor, "batch kv_heads slots value_dim"]
    filled: Int[Tensor, "batch"]
    scale: float
    softcap: float | None
    falling: Falling | None = None

    @property
    def request(self) -> StepRequest:
        """See `registry.Inputs`."""
        equal_widths = self.keys.shape[-1] == self.values.shape[-1]
        return StepRequest(
            self.q.device.type,
            self.q.dtype,
            softcap=self.softcap is not None,
            equal_widths=equal_widths,
            slopes=self.falling is not None,
        )


ATTENTION_STEP: Op[StepInputs] = Op("attention_step", Shapes(StepInputs, (("heads", "kv_heads"),)))


def attention_step(
    q: Float[Tensor, "batch heads head_dim"],
    keys: Float[Tensor, "batch kv_heads slots head_dim"],
    values: Float[Tensor, "batch kv_heads slots value_dim"],
    filled: Int[Tensor, "batch"],
    *,
    scale: float,
    softcap: float | None = None,
    falling: Falling | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads value_dim"]:
    """One token of `attention`, for decoding without gradients: each row sees its first `filled` slots, in any order.

    Args:
        keys: in another type than q, as a cache under autocast is, they decide what is computed in.
        filled: at least 1; a ring that has wrapped is filled.
        softcap: see `attention`.
        falling: the slopes of `attention`, and where the keys stand.
        backend: "auto" or one of `ATTENTION_STEP.backends`.

    Raises:
        FusionTreeError: shapes that do not agree, slopes of other heads.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    if falling is not None:
        falling = falling._replace(slopes=per_head("attention_step", falling.slopes, q))
    return ATTENTION_STEP(StepInputs(q, keys, values, filled, scale, softcap, falling), backend)


def _attend(inputs: StepInputs, kernel: BlockKernel) -> Float[Tensor, "batch heads value_dim"]:
    """Query heads become rows of their kv head; empty slots are masked."""
    q, keys, values, filled, scale, softcap, falling = inputs
    rows = rearrange(q.to(keys.dtype), "b (hk share) d -> b hk share d", hk=keys.shape[1])
    empty = torch.arange(keys.shape[2], device=q.device) >= filled[:, None]
    if falling is None:
        bias = torch.zeros(empty.shape, dtype=keys.dtype, device=q.device)[:, None, None]
    else:
        folding = Folding(rows.shape[2], keys.dtype, falling.slopes)
        bias = folding.fall(falling.distance[:, None])
    bias = bias.masked_fill_(empty[:, None, None], -torch.inf).expand(-1, -1, rows.shape[2], -1)
    y, _ = kernel.forward(Block(rows, keys, values, bias, scale, softcap))
    return y.flatten(1, 2).to(q.dtype)


@ATTENTION_STEP.backend("reference")
def reference(inputs: StepInputs) -> Float[Tensor, "batch heads value_dim"]:
    """Row by row over its filled slots alone, in the wide dtype: the truth, in float64."""
    dtype, outputs = wide(inputs.q.dtype), []
    share = inputs.q.shape[1] // inputs.keys.shape[1]
    for row, filled in enumerate(inputs.filled.tolist()):
        keys, values = (ring[row, :, :filled].to(dtype) for ring in (inputs.keys, inputs.values))
        scores = inputs.scale * (inputs.q[row].to(dtype).unflatten(0, (-1, share)) @ keys.mT)
        if inputs.softcap is not None:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        if inputs.falling is not None:
            slopes = constants(inputs.falling.slopes, dtype, scores.device).view(-1, share, 1)
            scores = scores - slopes * inputs.falling.distance[row, :filled]
        outputs.append((scores.softmax(-1) @ values).flatten(0, 1))
    return torch.stack(outputs).to(inputs.q.dtype)


@ATTENTION_STEP.backend("product", priority=10)
def product(inputs: StepInputs) -> Float[Tensor, "batch heads value_dim"]:
    """Matrix products over all slots; no data is read back."""
    return _attend(inputs, PRODUCT)


@ATTENTION_STEP.backend("flash_cpu", priority=20, supports=flash_refusal)
def flash_cpu(inputs: StepInputs) -> Float[Tensor, "batch heads value_dim"]:
    """torch's fused CPU kernel; over as many slots as the fullest row has where data can be read back."""
    if torch.compiler.is_compiling() or not inputs.filled.numel():
        return _attend(inputs, FLASH_CPU)
    most = max(1, int(inputs.filled.max()))  # the kernel divides by the number of keys
    keys, values = (ring[:, :, :most] for ring in (inputs.keys, inputs.values))
    falling = inputs.falling and inputs.falling._replace(distance=inputs.falling.distance[:, :most])
    return _attend(inputs._replace(keys=keys, values=values, falling=falling), FLASH_CPU)
