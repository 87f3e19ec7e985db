"""The boundary object: positions, documents and cache of the tokens of a forward pass."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusiontree.core.contracts.cache import Rows

Made = TypeVar("Made")
State = dict[str, Tensor]
"""A branch's cache of earlier tokens: named tensors, batch first. A branch writes it in place with detached values.
Before it writes, it clones the values that its own gradient still needs."""


class Table:
    """An encoding evaluated at the positions of one forward pass; hooks that an encoding lacks do nothing."""

    def input(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """A branch's input with the encoding added."""
        return x

    def rotate(self, x: Float[Tensor, "batch time heads channels"]) -> Float[Tensor, "batch time heads channels"]:
        """Queries, keys, B or C, rotated."""
        return x

    def slopes(self, heads: int) -> tuple[float, ...] | None:
        """How much attention scores fall per token of distance between key and query, one value for each head of a
        branch; None: scores do not depend on distance."""
        return None


class SharedValues:
    """Values that nodes of one layer publish for later layers, by local path. Not a dict: FSDP copies dict arguments,
    and writes to the copy would be lost."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.values: dict[str, Any] = dict(values or {})


@dataclass(frozen=True)
class Context:
    """Positions, documents and cache of a chunk of tokens.

    Attributes:
        positions: of the tokens; they restart at each document and continue after the cached tokens.
        segments: numbers the documents of each row from 0. Segment 0 continues the document in the cache, any other
            starts anew; -1 is padding, which always comes last. None: one document and no padding.
        tables: the encodings at these positions, by name.
        rows: lengths and slots of the rows in the cache; None without a cache.
        states: the current layer's cache, keyed by path within the layer, so that equal layers compile to one graph.
        embedding: the input of the first layer, for nodes that read it again.
        received: values that earlier layers published, by the local path of the node that reads them.
        published: where nodes of this layer leave values for later layers, by their local paths.
        text: False at the vectors of a prefix; None: there is no prefix in the chunk.
        made: the results of `once`, by function and arguments.
    """

    positions: Int[Tensor, "batch time"]
    segments: Int[Tensor, "batch time"] | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    rows: Rows | None = None
    states: Mapping[str, State] | None = None
    embedding: Float[Tensor, "batch time width"] | None = None
    received: SharedValues | None = None
    published: SharedValues | None = None
    text: Bool[Tensor, "batch time"] | None = None
    made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def real(self) -> Bool[Tensor, "batch time"] | None:
        """Which places are tokens, neither padding nor a prefix; None: all places."""
        if self.segments is None:
            return self.text
        tokens = self.segments >= 0
        return tokens if self.text is None else tokens & self.text

    def once(self, make: Callable[..., Made], *arguments: Hashable) -> Made:
        """`make(self, *arguments)`, computed once for all layers of a forward pass. `make` may read only the fields
        of the context that are equal for all layers: `positions`, `segments`, `rows` and `text`."""
        if torch.compiler.is_compiling():  # the compiler fuses it with the operations that read it
            return make(self, *arguments)
        key = (make, *arguments)
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = make(self, *arguments)
        return found

    def is_step(self, x: Float[Tensor, "batch time width"]) -> bool:
        """Whether the chunk is a decode step: one token a row, without gradients, so that states may be overwritten."""
        return x.shape[1] == 1 and not torch.is_grad_enabled()

    def encode(self, names: Sequence[str], x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """A branch's input plus the encodings `names`."""
        for name in names:
            x = self.tables[name].input(x)
        return x

    def rotate(
        self, names: Sequence[str], x: Float[Tensor, "batch time heads channels"]
    ) -> Float[Tensor, "batch time heads channels"]:
        """Queries, keys, B or C, rotated by the encodings `names`."""
        for name in names:
            x = self.tables[name].rotate(x)
        return x

    def slopes(self, names: Sequence[str], heads: int) -> tuple[float, ...] | None:
        """ALiBi slopes of the heads, from the first named encoding that has slopes; None where none has."""
        found = (self.tables[name].slopes(heads) for name in names)
        return next((slopes for slopes in found if slopes is not None), None)
