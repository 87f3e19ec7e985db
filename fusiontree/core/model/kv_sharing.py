"""What nodes of earlier layers lend to nodes of later ones within a forward pass: keys and values that are not made
twice (cross-layer sharing; Hymba, arXiv 2411.13676; arXiv 2405.12981)."""

from collections.abc import Mapping
from dataclasses import replace

from fusiontree.core.contracts.context import Context, Shelf


def split(path: str) -> tuple[int, str]:
    """The layer of a path, and the place in it."""
    _, layer, place = path.split(".", 2)
    return int(layer), place


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
