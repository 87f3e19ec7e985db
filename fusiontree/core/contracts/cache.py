"""The cache of a model: named tensors by node path, and the length, position and open document of each row."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fusiontree.errors import FusionTreeError


@dataclass(frozen=True)
class Rows:
    """Lengths and slots of the rows of a chunk, for nodes that write a cache.

    Attributes:
        past_length: tokens of the row's open document that the cache holds before the chunk.
        tail_start: index in the chunk of the first token of the document that is open at the chunk's end.
        continued_length: tokens of that document that came before the chunk.
        new_length: tokens of that document after the chunk.
        positions: the position of the row's next token.
        documents: the id of the document that is open at the chunk's end.
        has_tokens: whether the chunk has tokens for the row; None: it has tokens for every row.
        max_past_length: an upper bound of `past_length`; a Python int, so that reading it does not wait for the
            device.
        slots_needed: how many tokens a growing ring has to hold; None: rings have a fixed capacity.
        prefix: how many first tokens of a document keep their slots; a ring overwrites only the slots behind them.
    """

    past_length: Int[Tensor, "batch"]
    tail_start: Int[Tensor, "batch"]
    continued_length: Int[Tensor, "batch"]
    new_length: Int[Tensor, "batch"]
    positions: Int[Tensor, "batch"]
    documents: Int[Tensor, "batch"]
    has_tokens: Bool[Tensor, "batch"] | None
    max_past_length: int
    slots_needed: int | None
    prefix: int = 0


def _by_layer(states: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Group states by the path of the layer, then by the path of the node within the layer."""
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for path, state in states.items():
        above, layer, place = path.split(".", 2)
        layers.setdefault(f"{above}.{layer}", {})[place] = state
    return layers


class Cache:
    """The memory of a batch of sequences.

    A row continues its open document while the next tokens carry the same document id (or none); another id
    opens a new one. `nbytes` counts the nodes' states; the rows' own counters (24 bytes a row) are not in it.
    """

    def __init__(
        self,
        states: Mapping[str, dict[str, Tensor]],
        like: Int[Tensor, "batch"],
        capacity: int | None,
        made_for: object,
    ) -> None:
        self.states = states
        self.layers = _by_layer(states)
        self.capacity, self.made_for = capacity, made_for
        self.lengths = torch.zeros_like(like)
        self.positions = torch.zeros_like(like)
        self.documents = torch.zeros_like(like)
        self.length_bound = 0
        """Upper bound on `lengths` over all rows; a Python int, so reading it does not synchronise the device."""
        self.all_started = False
        """Whether every row is known to have seen a token; False may also mean that it was not checked."""
        self.of_inference = torch.is_inference_mode_enabled()
        """Whether the states may contain inference tensors, which only inference mode may write."""

    @property
    def batch(self) -> int:
        """The number of rows."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for state in self.states.values() for tensor in state.values())

    def slots_needed(self, tokens: int) -> int | None:
        """`Rows.slots_needed` of a chunk of so many tokens."""
        return self.length_bound + tokens if self.capacity is None else None

    def check_room(self, tokens: int) -> None:
        """Check that every row has room for `tokens` more; reads the device only if `length_bound` is too large.

        Raises:
            FusionTreeError: a row has no room for them.
        """
        if self.capacity is None or self.length_bound + tokens <= self.capacity:
            return
        self.length_bound = int(self.lengths.max())
        if self.length_bound + tokens > self.capacity:
            found = f"{self.length_bound} tokens and {tokens} more"
            raise FusionTreeError(f"cache: {found} do not fit, its max_length is {self.capacity}")

    def every_row_started(self) -> bool:
        """Whether every row has seen a token; reads from the device until the answer is yes."""
        self.all_started = self.all_started or (self.length_bound > 0 and bool((self.lengths > 0).all()))
        return self.all_started

    def leave_inference(self) -> None:
        """Outside inference mode, replace inference tensors by copies: torch forbids writes to the originals."""
        if not self.of_inference or torch.is_inference_mode_enabled():
            return
        for state in self.states.values():
            state.update({name: tensor.clone() for name, tensor in state.items() if tensor.is_inference()})
        self.lengths, self.positions, self.documents = (
            t.clone() for t in (self.lengths, self.positions, self.documents)
        )
        self.of_inference = False

    @torch.no_grad()
    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Replace row i by row `rows[i]`, as beam search needs it. The number of rows may change."""
        self.leave_inference()
        for state in self.states.values():
            for name, tensor in state.items():
                chosen = tensor[rows]
                state[name] = tensor.copy_(chosen) if chosen.shape == tensor.shape else chosen
        self.lengths, self.positions, self.documents = (
            each[rows] for each in (self.lengths, self.positions, self.documents)
        )
        self.of_inference = torch.is_inference_mode_enabled()

    def advance(self, rows: Rows, tokens: int) -> None:
        """Update the counters of the rows after all nodes have processed a chunk of `tokens` tokens."""
        self.lengths, self.positions, self.documents = rows.new_length, rows.positions, rows.documents
        self.length_bound += tokens
        self.all_started = self.all_started or rows.has_tokens is None
        self.of_inference = self.of_inference or torch.is_inference_mode_enabled()
