"""`attention_step`: attention for one new token of each row, over cached keys that its own has joined."""

from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.attention.block_kernels import capped, flash_refusal
from fusiontree.kernels.attention.op import per_head
from fusiontree.kernels.attention.visibility import BiasLayout
from fusiontree.kernels.common.constants import constants
from fusiontree.kernels.common.documents import accumulation_dtype
from fusiontree.kernels.common.shapes import Shapes
from fusiontree.kernels.registry import Op


class StepRequest(NamedTuple):
    """The properties of a call of `attention_step` that decide which backends serve it."""

    device: str
    dtype: torch.dtype
    softcap: bool
    equal_widths: bool
    slopes: bool = False


class AlibiBias(NamedTuple):
    """How scores fall: for each query head by its slope times the `distance`, in tokens from the key in a filled slot
    to the query."""

    slopes: tuple[float, ...]
    distance: Int[Tensor, "batch slots"]


class Filled(NamedTuple):
    """Which slots hold tokens; computed once for all layers whose rings have equally many slots.

    Attributes:
        count: filled slots of each row; the first slots are filled first.
        slots: upper bound of `count`, known without synchronising the device.
        bias: -inf for empty slots, 0 for filled ones; None where all are filled.
    """

    count: Int[Tensor, "batch"]
    slots: int
    bias: Float[Tensor, "batch 1 1 seen"] | None

    @classmethod
    def of(cls, count: Int[Tensor, "batch"], slots: int, dtype: torch.dtype) -> Self:
        """Look at the counts (at least 1 each) where that costs nothing; `dtype` is that of the keys."""
        if count.device.type == "cpu" and len(count) and not torch.compiler.is_compiling():
            counts = count.tolist()
            slots = max(1, *counts)  # torch's kernel divides by the number of keys
            if min(counts) == slots:
                return cls(count, slots, None)
        empty = torch.arange(slots, device=count.device) >= count[:, None]
        bias = torch.zeros(empty.shape, dtype=dtype, device=count.device).masked_fill_(empty, -torch.inf)
        return cls(count, slots, bias[:, None, None])


class StepInputs(NamedTuple):
    """The arguments of `attention_step`; `seen` is what is known of `filled` already."""

    q: Float[Tensor, "batch heads head_dim"]
    keys: Float[Tensor, "batch kv_heads slots head_dim"]
    values: Float[Tensor, "batch kv_heads slots value_dim"]
    filled: Int[Tensor, "batch"]
    scale: float
    softcap: float | None
    alibi: AlibiBias | None = None
    seen: Filled | None = None

    @property
    def request(self) -> StepRequest:
        """See `registry.Inputs`."""
        equal_widths = self.keys.shape[-1] == self.values.shape[-1]
        return StepRequest(
            self.q.device.type,
            self.q.dtype,
            softcap=self.softcap is not None,
            equal_widths=equal_widths,
            slopes=self.alibi is not None,
        )


_FLASH: Any = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
"""The same as of `torch.ops.aten`, called without a dispatch in Python."""
ATTENTION_STEP: Op[StepInputs] = Op("attention_step", Shapes(StepInputs, (("heads", "kv_heads"),)))


def attention_step(
    q: Float[Tensor, "batch heads head_dim"],
    keys: Float[Tensor, "batch kv_heads slots head_dim"],
    values: Float[Tensor, "batch kv_heads slots value_dim"],
    filled: Int[Tensor, "batch"] | Filled,
    *,
    scale: float,
    softcap: float | None = None,
    alibi: AlibiBias | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads value_dim"]:
    """One token of `attention`, for decoding without gradients: each row sees its first `filled` slots, in any order.

    Args:
        keys: if their dtype differs from q's, as that of a cache under autocast does, the computation uses theirs.
        filled: at least 1; a ring that has wrapped is full. With a `Filled` no shape is checked.
        softcap: see `attention`.
        alibi: the slopes of `attention`, and the distances of the keys.
        backend: "auto" or one of `ATTENTION_STEP.backends`.

    Raises:
        FusionTreeError: shapes that do not agree, slopes of other heads.
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    if alibi is not None:
        alibi = alibi._replace(slopes=per_head("attention_step", alibi.slopes, q))
    if isinstance(filled, Filled):
        return ATTENTION_STEP.serve(StepInputs(q, keys, values, filled.count, scale, softcap, alibi, filled), backend)
    return ATTENTION_STEP(StepInputs(q, keys, values, filled, scale, softcap, alibi), backend)


def _seen(
    inputs: StepInputs,
) -> tuple[
    Float[Tensor, "batch kv_heads rows head_dim"],
    Float[Tensor, "batch kv_heads seen head_dim"],
    Float[Tensor, "batch kv_heads seen value_dim"],
    Float[Tensor, "batch #kv_heads #rows seen"] | None,
]:
    """The operands of the products: query heads as rows of their kv head, the slots that any row sees, and the bias of
    the scores."""
    q, keys, values, filled, _, _, alibi, seen = inputs
    (batch, heads, width), (_, kv_heads, slots, _) = q.shape, keys.shape
    seen = seen or Filled.of(filled, slots, keys.dtype)
    q, bias = q.to(keys.dtype).view(batch, kv_heads, heads // kv_heads, width), seen.bias
    if seen.slots < slots:
        keys, values = keys.narrow(2, 0, seen.slots), values.narrow(2, 0, seen.slots)
    if alibi is not None:
        slopes = BiasLayout(q.shape[2], keys.dtype, alibi.slopes).alibi(alibi.distance[:, None, : seen.slots])
        bias = slopes if bias is None else slopes + bias
    return q, keys, values, bias


@ATTENTION_STEP.backend("reference")
def reference(inputs: StepInputs) -> Float[Tensor, "batch heads value_dim"]:
    """Row by row over its filled slots alone, in the accumulation dtype: the truth, in float64."""
    dtype, outputs = accumulation_dtype(inputs.q.dtype), []
    share = inputs.q.shape[1] // inputs.keys.shape[1]
    for row, filled in enumerate(inputs.filled.tolist()):
        keys, values = (ring[row, :, :filled].to(dtype) for ring in (inputs.keys, inputs.values))
        scores = inputs.scale * (inputs.q[row].to(dtype).unflatten(0, (-1, share)) @ keys.mT)
        if inputs.softcap is not None:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        if inputs.alibi is not None:
            slopes = constants(inputs.alibi.slopes, dtype, scores.device).view(-1, share, 1)
            scores = scores - slopes * inputs.alibi.distance[row, :filled]
        outputs.append((scores.softmax(-1) @ values).flatten(0, 1))
    return torch.stack(outputs).to(inputs.q.dtype)


@ATTENTION_STEP.backend("product", priority=10)
def product(inputs: StepInputs) -> Float[Tensor, "batch heads value_dim"]:
    """Two matrix products and a softmax, in the accumulation dtype."""
    q, k, v, bias = _seen(inputs)
    dtype = accumulation_dtype(k.dtype)
    scores = capped(q.to(dtype).mul(inputs.scale) @ k.to(dtype).mT, inputs.softcap)
    scores = scores if bias is None else scores.add_(bias)
    return (scores.softmax(-1) @ v.to(dtype)).flatten(1, 2).to(inputs.q.dtype)


@ATTENTION_STEP.backend("flash_cpu", priority=20, supports=flash_refusal)
def flash_cpu(inputs: StepInputs) -> Float[Tensor, "batch heads value_dim"]:
    """torch's fused CPU kernel."""
    q, k, v, bias = _seen(inputs)
    bias = bias if bias is None else bias.expand(-1, -1, q.shape[2], -1)
    y, _ = _FLASH(q, k, v, attn_mask=bias, scale=inputs.scale)
    return y.flatten(1, 2).to(inputs.q.dtype)
