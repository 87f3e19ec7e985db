"""What nodes of earlier layers lend to nodes of later ones within a forward pass: keys and values that are not made
twice (cross-layer sharing; Hymba, arXiv 2411.13676; arXiv 2405.12981)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusiontree.core.context import Context
from fusiontree.errors import suggest

if TYPE_CHECKING:
    from fusiontree.core.contracts import NodeSpec


def split(path: str) -> tuple[int, str]:
    """The layer of a path, and the place in it."""
    _, layer, place = path.split(".", 2)
    return int(layer), place


def problems(nodes: Mapping[str, "NodeSpec"]) -> Iterator[tuple[str, str]]:
    """Lenders that are not there, come too late, or lend what does not fit, by the path of who borrows."""
    lenders = {path: node for path, node in nodes.items() if path.startswith("layers.")}
    for path, node in nodes.items():
        if node.borrows is None:
            continue
        lender = lenders.get(node.borrows)
        if path not in lenders:
            found = "a shared node cannot read those of another"
        elif lender is None:
            found = f"no node is at {node.borrows!r}{suggest(node.borrows, lenders)}"
        elif split(node.borrows)[0] >= split(path)[0]:
            found = f"an earlier layer is needed, found {node.borrows}"
        else:
            found = node.refuses(lender)
        if found is not None:
            yield path, found


class Shelf:
    """What nodes of a layer lend, by their places. No dictionary, of which FSDP would give a layer a copy."""

    def __init__(self, kept: Mapping[str, Any] | None = None) -> None:
        self.kept: dict[str, Any] = dict(kept or {})


class Loans:
    """Who borrows from whom in a model: by the layer of a borrower and its place there, the layer and the place of who
    lends; and by the layer of a lender, the last that reads."""

    def __init__(self, borrows: Mapping[str, str]) -> None:
        self.places: dict[int, dict[str, tuple[int, str]]] = {}
        self.last: dict[int, int] = {}
        for borrower, lender in borrows.items():
            layer, place = split(borrower)
            self.places.setdefault(layer, {})[place] = split(lender)
            self.last[split(lender)[0]] = max(layer, self.last.get(split(lender)[0], 0))

    def __bool__(self) -> bool:
        return bool(self.places)


class Ledger:
    """The loans of one forward pass."""

    def __init__(self, loans: Loans) -> None:
        self.loans = loans
        self.lent: dict[int, Shelf] = {}

    def enter(self, layer: int, context: Context) -> Context:
        """What a layer is told: what its nodes borrow, and where they may leave what they lend."""
        places = self.loans.places.get(layer, {}).items()
        borrowed = Shelf({place: self.lent[there].kept[name] for place, (there, name) in places})
        lent = Shelf()
        self.lent = {there: kept for there, kept in self.lent.items() if self.loans.last[there] > layer}
        if layer in self.loans.last:
            self.lent[layer] = lent
        return replace(context, borrowed=borrowed, lent=lent)
