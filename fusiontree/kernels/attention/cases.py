"""Calls of `attention` and `attention_step` for laws, `bench` and `doctor`."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fusiontree.kernels.attention.decode import ATTENTION_STEP, StepInputs
from fusiontree.kernels.attention.op import ATTENTION, AttentionInputs, Past
from fusiontree.kernels.common.cases import Case, Device, Draw


@dataclass(frozen=True)
class AttentionCase(Case):
    """Attention over a sequence; windows and documents are at most a quarter of it, so that they always count.

    Attributes:
        value_dim: None is `head_dim`.
        document: the tokens of each document; None is one document.
        slopes: of each head; none is no bias.
        cached: slots of keys from before the call, some of them empty.
    """

    op: ClassVar[str] = "attention"
    carried: ClassVar[str] = "past"
    decodes: ClassVar[bool] = False
    values: ClassVar[tuple[str, ...]] = ("v",)
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    value_dim: int | None = None
    window: int | None = None
    document: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] = ()
    prefix: int = 0
    cached: int = 0

    def about(self, tokens: int) -> str:
        heads = f"{self.heads} heads on {self.kv_heads} x {self.head_dim}"
        window, document = self._at_most(self.window, tokens), self._at_most(self.document, tokens)
        sees = "full" if window is None else f"window {window}"
        return f"{heads}, {sees}" + ("" if document is None else f", documents of {document}")

    def inputs(
        self, tokens: int, dtype: torch.dtype, device: Device = "cpu", *, seed: int = 0, rows: int = 1
    ) -> AttentionInputs:
        draw = Draw(dtype, device, seed)
        document = self._at_most(self.document, tokens)
        return AttentionInputs(
            q=draw.normal(rows, tokens, self.heads, self.head_dim),
            k=draw.normal(rows, tokens, self.kv_heads, self.head_dim),
            v=draw.normal(rows, tokens, self.kv_heads, self.value_dim or self.head_dim),
            window=self._at_most(self.window, tokens),
            scale=self.head_dim**-0.5,
            softcap=self.softcap,
            segments=None if document is None else torch.arange(tokens, device=device)[None] // document,
            slopes=self.slopes or None,
            past=self._past(rows, draw) if self.cached else None,
            prefix=self.prefix,
        )

    def flops(self, tokens: int) -> float:
        """Scores and values over the keys that are seen; of cached ones nothing is counted."""
        document = self._at_most(self.document, tokens) or tokens
        window = (self._at_most(self.window, tokens) or tokens) + self.prefix
        seen = tokens // document * _seen(document, window) + _seen(tokens % document, window)
        return 2.0 * self.heads * (self.head_dim + (self.value_dim or self.head_dim)) * seen

    def carry(self, inputs: AttentionInputs, results: list[Tensor]) -> Past | None:
        """The keys of each row's last document, the newest first, and an empty slot with numbers that must not count;
        None where there is a prefix, which no call may cut."""
        if self.prefix:
            return None
        own = torch.zeros(inputs.q.shape[:2], dtype=torch.long) if inputs.segments is None else inputs.segments
        last = (own == own.amax(1, keepdim=True)) & (own >= 0)
        age = torch.where(last, torch.arange(own.shape[1], 0, -1), 0).flip(1)
        keys, values = (torch.cat([one.flip(1), torch.full_like(one[:, :1], 1e3)], 1) for one in (inputs.k, inputs.v))
        return Past(keys, values, torch.cat([age, torch.zeros_like(age[:, :1])], 1))

    def _at_most(self, size: int | None, tokens: int) -> int | None:
        return None if size is None else max(1, min(size, tokens // 4))

    def _past(self, rows: int, draw: Draw) -> Past:
        """Slots in any order (the oldest first where there is a prefix), some of them empty, in the first row all."""
        age = torch.stack([torch.randperm(self.cached, generator=draw.generator) + 1 for _ in range(rows)])
        age = age.masked_fill(age == 1 + self.cached // 2, 0) if self.prefix == 0 else age.sort(1, descending=True)[0]
        age[:1] = 0
        keys = draw.normal(rows, self.cached, self.kv_heads, self.head_dim)
        values = draw.normal(rows, self.cached, self.kv_heads, self.value_dim or self.head_dim)
        return Past(keys, values, age.to(draw.device))


def _seen(tokens: int, window: int) -> float:
    """How many keys the queries of one document see together."""
    window = min(tokens, window)
    return window * (window + 1) / 2 + (tokens - window) * window


@dataclass(frozen=True)
class StepCase(Case):
    """One new token in each row; `tokens` is the number of cached tokens of each row."""

    op: ClassVar[str] = "attention_step"
    learns: ClassVar[bool] = False
    loops: ClassVar[bool] = False
    rows: int = 8
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64

    def about(self, tokens: int) -> str:
        heads = f"{self.heads} heads on {self.kv_heads} x {self.head_dim}"
        return f"decoding {self.rows} rows over {tokens} slots, {heads}"

    def inputs(
        self, tokens: int, dtype: torch.dtype, device: Device = "cpu", *, seed: int = 0, rows: int = 1
    ) -> StepInputs:
        draw, rows = Draw(dtype, device, seed), rows * self.rows
        return StepInputs(
            q=draw.normal(rows, self.heads, self.head_dim),
            keys=draw.normal(rows, self.kv_heads, tokens, self.head_dim),
            values=draw.normal(rows, self.kv_heads, tokens, self.head_dim),
            filled=torch.full((rows,), tokens, device=device),
            scale=self.head_dim**-0.5,
            softcap=None,
        )

    def flops(self, tokens: int) -> float:
        return 4.0 * self.rows * self.heads * self.head_dim * tokens

    def made(self, tokens: int) -> int:
        return self.rows

    def results(self, inputs: StepInputs) -> list[Tensor]:
        return [torch.empty_like(inputs.q)]


_SLOPES = (0.013, 0.5, 1e-3, 0.11)
_SMALL = AttentionCase(heads=4, kv_heads=2, head_dim=8)
ATTENTION.cases = {
    "attention": AttentionCase(),
    "attention, windowed": AttentionCase(window=1024),
    "attention, packed": AttentionCase(document=500),
}
ATTENTION.examples = (
    _SMALL,
    AttentionCase(heads=6, kv_heads=2, head_dim=4, value_dim=5, window=60),
    replace(_SMALL, value_dim=11, softcap=2.0, cached=9),
    replace(_SMALL, window=40, cached=70),
    replace(_SMALL, slopes=_SLOPES, cached=9),
    replace(_SMALL, window=60, prefix=3, slopes=_SLOPES),
    AttentionCase(heads=4, kv_heads=1, head_dim=8, window=7, prefix=130, cached=20),
)
ATTENTION_STEP.cases = {"attention_step": StepCase()}
