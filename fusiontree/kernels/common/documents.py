"""Document boundaries, with one meaning for every operator.

`segments` numbers the documents of a row: nondecreasing from 0 on, a new number is a new document, -1 is
padding at the end. Segment 0 continues what came before the call (a state, cached keys); every other
segment starts from nothing. None is one document that continues, without padding.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PADDING = -1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states, decays and softmax are kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


class Packed(NamedTuple):
    """The documents of a batch, packed one after another, as variable-length kernels take them.

    Padding is left out, unless the batch is all padding: kernels cannot take zero tokens.

    Attributes:
        bounds: where each document starts, then where the last one ends (what kernels call cu_seqlens), int32.
        host: `bounds` on the CPU, so that reading them does not synchronise the device.
        rows: the row that each document is in.
        continues: which documents continue what came before the call.
        last: the last document of each row; -1 in a row of padding.
        tokens: which of batch * time tokens are kept; None is all of them.
        longest: the tokens of the longest document.
        shape: batch and time.
    """

    bounds: Int[Tensor, "documents+1"]
    host: Int[Tensor, "documents+1"]
    rows: Int[Tensor, "documents"]
    continues: Bool[Tensor, "documents"]
    last: Int[Tensor, "batch"]
    tokens: Int[Tensor, "tokens"] | None
    longest: int
    shape: tuple[int, int]

    def pack(self, values: Float[Tensor, "batch time *features"]) -> Float[Tensor, "tokens *features"]:
        """The documents' tokens."""
        values = values.flatten(0, 1)
        return values if self.tokens is None else values[self.tokens]

    def unpack(self, values: Float[Tensor, "tokens *features"]) -> Float[Tensor, "batch time *features"]:
        """The reverse of `pack`, with zeros where padding was left out."""
        if self.tokens is not None:
            empty = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
            values = empty.index_copy(0, self.tokens, values)
        return values.unflatten(0, self.shape)

    def entering(self, state: Float[Tensor, "batch *features"]) -> Float[Tensor, "documents *features"]:
        """The state that each document starts from: its row's, or zeros."""
        return torch.where(_over(self.continues, state), state[self.rows], 0.0)

    def leaving(
        self, states: Float[Tensor, "documents *features"], before: Float[Tensor, "batch *features"]
    ) -> Float[Tensor, "batch *features"]:
        """The state after each row's last document; the one before the call in a row of padding."""
        return torch.where(_over(self.last >= 0, before), states[self.last], before)


def _over(mask: Bool[Tensor, "rows"], values: Tensor) -> Tensor:
    return mask.reshape(-1, *(1 for _ in values.shape[1:]))


def packed(segments: Int[Tensor, "batch time"] | None, like: Float[Tensor, "batch time *features"]) -> Packed:
    """The documents of a batch; waits for the device once for each tensor of segments, which layers share."""
    if segments is None:
        return _whole(like.shape[0], like.shape[1], like.device)
    if segments.is_inference():  # nothing tells when such a tensor changes
        return _pack(segments.cpu(), segments.device)
    version, known = segments._version, _packed.get(segments)
    if known is None or known[0] != version:
        known = _packed[segments] = (version, _pack(segments.cpu(), segments.device))
    return known[1]


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept may be met again in training
def _whole(batch: int, time: int, device: torch.device) -> Packed:
    return _pack(torch.zeros(batch, time, dtype=torch.long), device)


def _pack(segments: Int[Tensor, "batch time"], device: torch.device) -> Packed:
    kept = real(segments)
    if not kept.any():
        segments, kept = torch.zeros_like(segments), torch.ones_like(kept)
    begins = torch.ones_like(kept)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    tokens = kept.flatten().nonzero()[:, 0]
    starts = begins.flatten()[tokens].nonzero()[:, 0]
    rows = tokens[starts] // segments.shape[1]
    counts = rows.bincount(minlength=len(segments))
    host = torch.cat([starts, tokens.new_tensor([len(tokens)])]).int()
    return Packed(
        bounds=host.to(device),
        host=host,
        rows=rows.to(device),
        continues=(segments.flatten()[tokens[starts]] == 0).to(device),
        last=torch.where(counts > 0, counts.cumsum(0) - 1, -1).to(device),
        tokens=None if kept.all() else tokens.to(device),
        longest=int(host.diff().max()),
        shape=(segments.shape[0], segments.shape[1]),
    )
