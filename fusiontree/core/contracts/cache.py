"""What a model remembers of the tokens it has seen: named tensors by node path, and where each row stands."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fusiontree.errors import FusionTreeError


@dataclass(frozen=True)
class Rows:
    """Where the rows of a chunk stand, for the nodes that write a cache.

    Attributes:
        before: tokens of the row's open document that the cache holds as the chunk starts.
        tail: index in the chunk of the first token of the document that is open at its end.
        carried: tokens of that document that came before the chunk.
        after: tokens of that document once the chunk is in.
        positions: the position that the row's next token has.
        documents: the id of the document that is open at the chunk's end.
        fresh: which rows the chunk brings tokens; None: all of them.
        held: no row has more tokens in the cache as the chunk starts; a bound that nobody has to ask a device for.
        room: how many tokens a ring that grows has to hold; None where rings have room for all that may come.
        prefix: the first tokens of a document that keep their slots; only those behind them go round.
    """

    before: Int[Tensor, "batch"]
    tail: Int[Tensor, "batch"]
    carried: Int[Tensor, "batch"]
    after: Int[Tensor, "batch"]
    positions: Int[Tensor, "batch"]
    documents: Int[Tensor, "batch"]
    fresh: Bool[Tensor, "batch"] | None
    held: int
    room: int | None
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
        self.seen = torch.zeros_like(like)
        self.positions = torch.zeros_like(like)
        self.documents = torch.zeros_like(like)
        self.most = 0
        """No row has seen more; known without looking at the device."""
        self.begun = False
        """Every row has seen a token; False may only mean that nobody looked."""
        self.of_inference = torch.is_inference_mode_enabled()
        """Tensors may be among the states that only inference mode may write."""

    @property
    def batch(self) -> int:
        """The number of rows."""
        return self.seen.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for state in self.states.values() for tensor in state.values())

    def room(self, tokens: int) -> int | None:
        """`Rows.room` of a chunk of so many tokens."""
        return self.most + tokens if self.capacity is None else None

    def check_room(self, tokens: int) -> None:
        """Make sure that `tokens` more fit every row; where the bound does not show it, the device is asked.

        Raises:
            FusionTreeError: they do not.
        """
        if self.capacity is None or self.most + tokens <= self.capacity:
            return
        self.most = int(self.seen.max())
        if self.most + tokens > self.capacity:
            found = f"{self.most} tokens and {tokens} more"
            raise FusionTreeError(f"cache: {found} do not fit, its max_length is {self.capacity}")

    def all_begun(self) -> bool:
        """Whether every row has seen a token; asks the device until it says yes."""
        self.begun = self.begun or (self.most > 0 and bool((self.seen > 0).all()))
        return self.begun

    def leave_inference(self) -> None:
        """Let what inference mode has made be written outside of it: torch allows that of copies alone."""
        if not self.of_inference or torch.is_inference_mode_enabled():
            return
        for state in self.states.values():
            state.update({name: tensor.clone() for name, tensor in state.items() if tensor.is_inference()})
        self.seen, self.positions, self.documents = (t.clone() for t in (self.seen, self.positions, self.documents))
        self.of_inference = False

    @torch.no_grad()
    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Let row i go on where row `rows[i]` stands, as a search with beams wants it; there may be more rows then, or
        fewer."""
        self.leave_inference()
        for state in self.states.values():
            for name, tensor in state.items():
                chosen = tensor[rows]
                state[name] = tensor.copy_(chosen) if chosen.shape == tensor.shape else chosen
        self.seen, self.positions, self.documents = (each[rows] for each in (self.seen, self.positions, self.documents))
        self.of_inference = torch.is_inference_mode_enabled()

    def advance(self, rows: Rows, tokens: int) -> None:
        """Take note of a chunk of so many tokens that every node has seen."""
        self.seen, self.positions, self.documents = rows.after, rows.positions, rows.documents
        self.most += tokens
        self.begun = self.begun or rows.fresh is None
        self.of_inference = self.of_inference or torch.is_inference_mode_enabled()
