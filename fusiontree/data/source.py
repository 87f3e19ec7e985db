"""Where documents come from: the contract of a source, its registry, and the split every source shares."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from fusiontree.core.spec.base import Spec
from fusiontree.core.spec.registry import Registry
from fusiontree.errors import FusionTreeError

Split = Literal["train", "held_out"]
"""Documents to learn from, and documents to measure on."""

Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""A part of the whole, from nothing to almost everything."""


class DataError(FusionTreeError):
    """Data that cannot be read or is malformed: one line with the place and what was found there."""


@dataclass(frozen=True, slots=True)
class Document:
    """One complete text.

    Attributes:
        name: decides the split; the same on every machine.
        text: the bytes as they are, UTF-8 or not.
        origin: the name in messages about changed text, for example the path of its file.
    """

    name: str
    text: bytes
    origin: str = "the source"


class SourceSpec(Spec):
    """A place that documents come from, in an order that never changes."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """Read the documents of one split, one at a time.

        Raises:
            DataError: a file is missing, unreadable or malformed.
        """

    def relative_to(self, folder: Path) -> Self:
        """The same source with its relative paths taken from a folder, that of the file it was read from."""
        return self


sources = Registry("source", SourceSpec)
"""Every kind of source, by name."""

Source = Annotated[SourceSpec, sources]
"""A field that holds any source."""


def split_of(name: str, held_out_share: float) -> Split:
    """The split of a document, decided by the SHA-256 of its name alone.

    So it does not depend on the seed, the order, or what other documents there are, and a document that is
    held out at one share is held out at every larger one.
    """
    digest = sha256(name.encode(errors="surrogateescape")).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out_share * 2**64 else "train"
