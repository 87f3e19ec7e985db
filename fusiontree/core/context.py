"""The one boundary object: what a forward pass knows about its tokens besides their features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from fusiontree.core.cache import Rows
    from fusiontree.core.contracts import Node, State, Table


@dataclass(frozen=True)
class Context:
    """Where each token stands, and what came before.

    `segments` numbers the documents of each row from 0: segment 0 continues what the cache holds, any other
    starts from nothing, -1 is padding and only ever trails. None means one document and no padding. `states` are
    those of one layer, by the place of the node in it, so that equal layers have equal contexts; so is what its
    nodes have `borrowed` from earlier layers, and what they have `lent` to later ones. `embedding` is what the first
    layer reads, where a node reads it again.
    """

    positions: Int[Tensor, "batch time"]
    segments: Int[Tensor, "batch time"] | None = None
    tables: Mapping[str, "Table"] = field(default_factory=dict)
    rows: "Rows | None" = None
    states: Mapping[str, "State"] | None = None
    embedding: Float[Tensor, "batch time width"] | None = None
    borrowed: Mapping[str, Any] = field(default_factory=dict)
    lent: dict[str, Any] = field(default_factory=dict)

    def state(self, node: "Node") -> "State | None":
        """What the cache holds for this node; None when there is no cache."""
        return None if self.states is None else self.states[node.place]

    def is_step(self, x: Float[Tensor, "batch time width"]) -> bool:
        """Whether a chunk is one token a row and no gradient will ask for what states were before it."""
        return x.shape[1] == 1 and not (torch.is_grad_enabled() and x.requires_grad)

    def encode(self, names: Sequence[str], x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """A branch's input with the encodings that it names added."""
        for name in names:
            x = self.tables[name].input(x)
        return x

    def rotate(
        self, names: Sequence[str], x: Float[Tensor, "batch time heads channels"]
    ) -> Float[Tensor, "batch time heads channels"]:
        """Queries, keys, B or C, rotated by the encodings that the branch names."""
        for name in names:
            x = self.tables[name].rotate(x)
        return x
