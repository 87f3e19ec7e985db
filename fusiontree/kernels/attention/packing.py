"""Shared by the backends of `attention` whose kernels take documents packed one after another."""

from collections.abc import Callable
from typing import NamedTuple

from einops import repeat
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.attention.op import AttentionInputs, AttentionRequest
from fusiontree.kernels.common.documents import Packed, packed, silence_padding
from fusiontree.kernels.common.packages import capability, half

Tokens = Float[Tensor, "tokens heads head_dim"]


class KernelLimits(NamedTuple):
    """What the kernels of a library support. None takes cached keys, because those are in no order.

    Attributes:
        generations: the first numbers of the GPU's compute capability.
        multiple: head_dim must be a multiple of it.
        largest: the largest head_dim.
        softcap, slopes: whether the kernels support them.
        unequal_widths: whether value_dim may differ from head_dim.
    """

    generations: range = range(8, 13)
    multiple: int = 8
    largest: int = 256
    softcap: bool = False
    slopes: bool = False
    unequal_widths: bool = False

    def refusal(self, request: AttentionRequest) -> str | None:
        """Why a request on a CUDA device is not served, or None."""
        found = self._device_refusal() or half(request.dtype)
        if found is not None:
            return found
        if request.past:
            return "serves no cached keys"
        if request.prefix:
            return "serves no prefix"
        if request.softcap and not self.softcap:
            return "has no softcap"
        if request.slopes and not self.slopes:
            return "has no slopes"
        return self._width_refusal(request)

    def _device_refusal(self) -> str | None:
        first, last = self.generations[0], self.generations[-1]
        return None if capability()[0] in self.generations else f"only on GPUs of compute capability {first} to {last}"

    def _width_refusal(self, request: AttentionRequest) -> str | None:
        if not (request.equal_widths or self.unequal_widths):
            return "wants value_dim = head_dim"
        if request.head_dim % self.multiple:
            return f"head_dim must be a multiple of {self.multiple}"
        too_wide = max(request.head_dim, request.value_dim) > self.largest
        return f"head_dim and value_dim must be at most {self.largest}" if too_wide else None


def over_documents(
    inputs: AttentionInputs, attend: Callable[[Packed, Tokens, Tokens, Tokens], Tokens]
) -> Float[Tensor, "batch time heads value_dim"]:
    """Run `attend` on the queries, keys and values of the documents; padding is zeros."""
    documents = packed(inputs.segments, inputs.q)
    y = attend(documents, documents.pack(inputs.q), documents.pack(inputs.k), documents.pack(inputs.v))
    return silence_padding(documents.unpack(y), inputs.segments)


def per_query_head(values: Tokens, heads: int) -> Tokens:
    """Keys or values once for every query head, for kernels that cannot share them."""
    return repeat(values, "t hk d -> t (hk share) d", share=heads // values.shape[1])
