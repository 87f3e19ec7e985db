"""The section `data` of a run file."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from fusiontree.core.spec.base import Count, Spec
from fusiontree.data.batches import Batches
from fusiontree.data.corpus import Corpus
from fusiontree.data.held_out import HeldOut
from fusiontree.data.source import Document, Source, Split


@dataclass(frozen=True, slots=True)
class Size:
    """How much text a split holds."""

    documents: int
    bytes: int


class DataSpec(Spec):
    """The text for training and for measurement.

    Attributes:
        source: the source of the documents.
        length: tokens in a row.
        bytes: the most bytes to take of each split, for quick runs. The first documents in source order are taken,
            and the last of them is cut.
    """

    source: Source
    length: Count
    bytes: Count | None = None

    def relative_to(self, folder: Path) -> Self:
        """The same data with the source's relative paths resolved against a folder."""
        return self.model_copy(update={"source": self.source.relative_to(folder)})

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of one split, up to the limit."""
        documents = self.source.documents(split)
        return documents if self.bytes is None else _first(documents, self.bytes)

    def corpus(self, split: Split) -> Corpus:
        """The tokens of one split.

        Raises:
            DataError: the source cannot be read, or has no text for this split.
        """
        kind = self.source.data()["kind"]
        return Corpus.read(self.documents(split), named=f"source {kind!r}: the {split} split")

    def batches(self, *, rows: int, seed: int = 0) -> Batches:
        """The training batches, with `rows` rows per step over all ranks."""
        return Batches(self.corpus("train"), rows=rows, length=self.length, seed=seed)

    def held_out(self, length: int | None = None) -> HeldOut:
        """The held-out rows to measure on. `length` tokens per row; None: as long as the training rows."""
        return HeldOut(self.corpus("held_out"), self.length if length is None else length)

    def sizes(self) -> dict[Split, Size]:
        """The number of documents and bytes of each split, counted without keeping the text."""
        return {"train": _size(self.documents("train")), "held_out": _size(self.documents("held_out"))}


def _first(documents: Iterator[Document], left: int) -> Iterator[Document]:
    for document in documents:
        yield replace(document, text=document.text[:left])
        left -= len(document.text)
        if left <= 0:
            return


def _size(documents: Iterator[Document]) -> Size:
    lengths = [len(document.text) for document in documents]
    return Size(len(lengths), sum(lengths))
