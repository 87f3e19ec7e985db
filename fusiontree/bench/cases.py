"""One representative call of each operator, or a few: sizes, inputs, and the work that cannot be avoided.

case = CASES["ssd"]
OPS[case.op](case.inputs(4096, torch.bfloat16), "chunked")
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.bench.limits import Work
from fusiontree.kernels.attention import AttentionInputs, StepInputs
from fusiontree.kernels.causal_conv1d import ConvInputs
from fusiontree.kernels.gated_delta import GatedDeltaInputs
from fusiontree.kernels.linear_recurrence import LinearRecurrenceInputs
from fusiontree.kernels.selective_scan import SelectiveScanInputs
from fusiontree.kernels.ssd import SSDInputs

FORWARD, TRAINING = "forward", "training"
TASKS = (FORWARD, TRAINING)
Device = torch.device | str


class Draw:
    """Random tensors of a dtype, the same on every device."""

    def __init__(self, dtype: torch.dtype, device: Device, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int) -> Float[Tensor, "*shape"]:
        """Standard normal, in the dtype."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Float[Tensor, "*shape"]:
        """Between two numbers, in float32, as step sizes and rates are kept."""
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(self.device)


@dataclass(frozen=True)
class Case(ABC):
    """One row of tokens through an operator.

    Attributes:
        op: the operator's name in `fusiontree.kernels.OPS`.
        learns: whether it has gradients.
        loops: whether its reference takes one token at a time.
        compiled: the backends that make something else of a call inside `torch.compile`.
    """

    op: ClassVar[str]
    learns: ClassVar[bool] = True
    loops: ClassVar[bool] = True
    compiled: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def about(self, tokens: int) -> str:
        """The sizes, for people."""

    @abstractmethod
    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", seed: int = 0) -> Any:
        """Random arguments of a call, as the operator takes them."""

    @abstractmethod
    def flops(self, tokens: int) -> float:
        """Of one forward call by the operator's definition, whatever a backend makes of it; those of its reference."""

    def made(self, tokens: int) -> int:
        """How many tokens come out of one call."""
        return tokens

    def results(self, inputs: Any) -> list[Tensor]:
        """Empty tensors like the results."""
        return inputs.results()

    def work(self, tokens: int, inputs: Any, task: str) -> Work:
        """What no backend can do without.

        Forward reads the arguments and writes the results, each once. Training has three times the FLOPs; its
        backward reads the arguments again, and the results' gradients, and writes those of the arguments.
        """
        read, written = _bytes(inputs), _bytes(self.results(inputs))
        if task == FORWARD:
            return Work(self.flops(tokens), read + written)
        return Work(3 * self.flops(tokens), 3 * read + 2 * written)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


@dataclass(frozen=True)
class SSDCase(Case):
    """Mamba-2's scan in a layer of width 512."""

    op: ClassVar[str] = "ssd"
    compiled: ClassVar[tuple[str, ...]] = ("chunked",)
    heads: int = 16
    head_dim: int = 64
    state: int = 128
    groups: int = 1

    def about(self, tokens: int) -> str:
        """See `Case`."""
        return f"{self.heads} heads x {self.head_dim}, state {self.state}, groups {self.groups}"

    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", seed: int = 0) -> SSDInputs:
        """See `Case`."""
        draw = Draw(dtype, device, seed)
        return SSDInputs(
            x=draw.normal(1, tokens, self.heads, self.head_dim),
            dt=draw.uniform(0.001, 0.1, 1, tokens, self.heads),
            A=-draw.uniform(1.0, 16.0, self.heads),
            B=draw.normal(1, tokens, self.groups, self.state),
            C=draw.normal(1, tokens, self.groups, self.state),
            initial_state=None,
            segments=None,
        )

    def flops(self, tokens: int) -> float:
        """An outer product and a read of every state: products within chunks are a backend's own choice."""
        return 4.0 * tokens * self.heads * self.head_dim * self.state


@dataclass(frozen=True)
class SelectiveScanCase(Case):
    """Mamba-1's scan in a layer of width 512."""

    op: ClassVar[str] = "selective_scan"
    channels: int = 1024
    state: int = 16

    def about(self, tokens: int) -> str:
        """See `Case`."""
        return f"{self.channels} channels x {self.state}"

    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", seed: int = 0) -> SelectiveScanInputs:
        """See `Case`."""
        draw = Draw(dtype, device, seed)
        return SelectiveScanInputs(
            x=draw.normal(1, tokens, self.channels),
            dt=draw.uniform(0.001, 0.1, 1, tokens, self.channels),
            A=-draw.uniform(1.0, 16.0, self.channels, self.state),
            B=draw.normal(1, tokens, 1, self.state),
            C=draw.normal(1, tokens, 1, self.state),
            initial_state=None,
            segments=None,
        )

    def flops(self, tokens: int) -> float:
        """As for `ssd`; its exponentials, one for each entry, are not counted."""
        return 4.0 * tokens * self.channels * self.state


@dataclass(frozen=True)
class GatedDeltaCase(Case):
    """Gated DeltaNet's scan in a layer of width 512."""

    op: ClassVar[str] = "gated_delta"
    heads: int = 8
    key_heads: int = 4
    key_dim: int = 128
    value_dim: int = 128

    def about(self, tokens: int) -> str:
        """See `Case`."""
        return f"{self.heads} heads x {self.value_dim} on {self.key_heads} x {self.key_dim}"

    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", seed: int = 0) -> GatedDeltaInputs:
        """See `Case`."""
        draw = Draw(dtype, device, seed)
        keys = 1, tokens, self.key_heads, self.key_dim
        return GatedDeltaInputs(
            q=draw.normal(*keys) / self.key_dim,
            k=draw.normal(*keys) / math.sqrt(self.key_dim),
            v=draw.normal(1, tokens, self.heads, self.value_dim),
            g=-draw.uniform(0.001, 0.1, 1, tokens, self.heads),
            beta=draw.uniform(0.0, 1.0, 1, tokens, self.heads),
            initial_state=None,
            segments=None,
        )

    def flops(self, tokens: int) -> float:
        """A read of every state for the error, an outer product, and a read for the output."""
        return 6.0 * tokens * self.heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class LinearRecurrenceCase(Case):
    """RG-LRU's recurrence in a layer of width 1024."""

    op: ClassVar[str] = "linear_recurrence"
    channels: int = 1024

    def about(self, tokens: int) -> str:
        """See `Case`."""
        return f"{self.channels} channels"

    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", seed: int = 0) -> LinearRecurrenceInputs:
        """See `Case`."""
        draw, shape = Draw(dtype, device, seed), (1, tokens, self.channels)
        return LinearRecurrenceInputs(draw.normal(*shape), draw.uniform(0.9, 0.999, *shape), None, None)

    def flops(self, tokens: int) -> float:
        """There is no matrix product."""
        return 0.0


@dataclass(frozen=True)
class ConvCase(Case):
    """The convolution of a layer with 1024 inner channels, and 128 each for B and C."""

    op: ClassVar[str] = "causal_conv1d"
    compiled: ClassVar[tuple[str, ...]] = ("shifted",)
    channels: int = 1280
    taps: int = 4

    def about(self, tokens: int) -> str:
        """See `Case`."""
        return f"{self.channels} channels, {self.taps} taps"

    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", seed: int = 0) -> ConvInputs:
        """See `Case`."""
        draw = Draw(dtype, device, seed)
        return ConvInputs(
            x=draw.normal(1, tokens, self.channels),
            weight=draw.normal(self.channels, self.taps),
            bias=draw.normal(self.channels),
            initial_state=None,
            segments=None,
        )

    def flops(self, tokens: int) -> float:
        """See `Case`."""
        return 2.0 * tokens * self.channels * self.taps


@dataclass(frozen=True)
class AttentionCase(Case):
    """Attention over a sequence; windows and documents are at most a quarter of it, so that they always count."""

    op: ClassVar[str] = "attention"
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    window: int | None = None
    document: int | None = None
    """The tokens of each document; None is one document."""

    def about(self, tokens: int) -> str:
        """See `Case`."""
        heads = f"{self.heads} heads on {self.kv_heads} x {self.head_dim}"
        window, document = self._at_most(self.window, tokens), self._at_most(self.document, tokens)
        sees = "full" if window is None else f"window {window}"
        return f"{heads}, {sees}" + ("" if document is None else f", documents of {document}")

    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", seed: int = 0) -> AttentionInputs:
        """See `Case`."""
        draw = Draw(dtype, device, seed)
        document = self._at_most(self.document, tokens)
        return AttentionInputs(
            q=draw.normal(1, tokens, self.heads, self.head_dim),
            k=draw.normal(1, tokens, self.kv_heads, self.head_dim),
            v=draw.normal(1, tokens, self.kv_heads, self.head_dim),
            window=self._at_most(self.window, tokens),
            scale=self.head_dim**-0.5,
            softcap=None,
            segments=None if document is None else torch.arange(tokens, device=device)[None] // document,
        )

    def flops(self, tokens: int) -> float:
        """Scores and values over the keys that are seen."""
        document = self._at_most(self.document, tokens) or tokens
        window = self._at_most(self.window, tokens) or tokens
        seen = tokens // document * _seen(document, window) + _seen(tokens % document, window)
        return 4.0 * self.heads * self.head_dim * seen

    def _at_most(self, size: int | None, tokens: int) -> int | None:
        return None if size is None else max(1, min(size, tokens // 4))


def _seen(tokens: int, window: int) -> float:
    """How many keys the queries of one document see together."""
    window = min(tokens, window)
    return window * (window + 1) / 2 + (tokens - window) * window


@dataclass(frozen=True)
class StepCase(Case):
    """One new token of some rows; `tokens` are those cached of each row."""

    op: ClassVar[str] = "attention_step"
    learns: ClassVar[bool] = False
    loops: ClassVar[bool] = False
    rows: int = 8
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64

    def about(self, tokens: int) -> str:
        """See `Case`."""
        return f"decoding {self.rows} rows over {tokens} slots, {self.heads} heads on {self.kv_heads} x {self.head_dim}"

    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", seed: int = 0) -> StepInputs:
        """See `Case`."""
        draw = Draw(dtype, device, seed)
        return StepInputs(
            q=draw.normal(self.rows, self.heads, self.head_dim),
            keys=draw.normal(self.rows, self.kv_heads, tokens, self.head_dim),
            values=draw.normal(self.rows, self.kv_heads, tokens, self.head_dim),
            filled=torch.full((self.rows,), tokens, device=device),
            scale=self.head_dim**-0.5,
            softcap=None,
        )

    def flops(self, tokens: int) -> float:
        """See `Case`."""
        return 4.0 * self.rows * self.heads * self.head_dim * tokens

    def made(self, tokens: int) -> int:
        """One a row."""
        return self.rows

    def results(self, inputs: StepInputs) -> list[Tensor]:
        """See `Case`."""
        return [torch.empty_like(inputs.q)]


CASES: dict[str, Case] = {
    "ssd": SSDCase(),
    "selective_scan": SelectiveScanCase(),
    "gated_delta": GatedDeltaCase(),
    "linear_recurrence": LinearRecurrenceCase(),
    "causal_conv1d": ConvCase(),
    "attention": AttentionCase(),
    "attention, windowed": AttentionCase(window=1024),
    "attention, packed": AttentionCase(document=500),
    "attention_step": StepCase(),
}
