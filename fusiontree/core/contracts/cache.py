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
        past_length: tokens of the row's open document that the cache holds as the chunk starts.
        tail_start: index in the chunk of the first token of the document that is open at its end.
        continued_length: tokens of that document that came before the chunk.
        new_length: tokens of that document once the chunk is in.
        positions: the position that the row's next token has.
        documents: the id of the document that is open at the chunk's end.
        has_tokens: which rows the chunk brings tokens; None: all of them.
        max_past_length: an upper bound of `past_length`; a Python int, so that reading it does not wait for the
            device.
        slots_needed: how many tokens a ring that grows has to hold; None where rings have room for all that may come.
        prefix: the first tokens of a document that keep their slots; only those behind them go round.
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
    """By the path of a layer, then by the place of a node in it."""
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
        """No row has seen more; known without looking at the device."""
        self.all_started = False
        """Every row has seen a token; False may only mean that nobody looked."""
        self.of_inference = torch.is_inference_mode_enabled()
        """Tensors may be among the states that only inference mode may write."""

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
        """Make sure that `tokens` more fit every row; where the bound does not show it, the device is asked.

        Raises:
            FusionTreeError: they do not.
        """
        if self.capacity is None or self.length_bound + tokens <= self.capacity:
            return
        self.length_bound = int(self.lengths.max())
        if self.length_bound + tokens > self.capacity:
            found = f"{self.length_bound} tokens and {tokens} more"
            raise FusionTreeError(f"cache: {found} do not fit, its max_length is {self.capacity}")

    def every_row_started(self) -> bool:
        """Whether every row has seen a token; asks the device until it says yes."""
        self.all_started = self.all_started or (self.length_bound > 0 and bool((self.lengths > 0).all()))
        return self.all_started

    def leave_inference(self) -> None:
        """Copy the states that inference mode made: outside of it torch allows writes to copies only."""
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
        """Take note of a chunk of so many tokens that every node has seen."""
        self.lengths, self.positions, self.documents = rows.new_length, rows.positions, rows.documents
        self.length_bound += tokens
        self.all_started = self.all_started or rows.has_tokens is None
        self.of_inference = self.of_inference or torch.is_inference_mode_enabled()
