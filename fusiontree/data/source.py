"""The contract of a source of documents, the registry of sources, and the split that all sources share."""

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
"""Documents for training, and documents for measurement."""

Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""A part of the whole, from nothing to almost everything."""


class DataError(FusionTreeError):
    """Data that cannot be read or is malformed: one line with the place and what was found there."""


@dataclass(frozen=True, slots=True)
class Document:
    """One complete text.

    Attributes:
        name: decides the split; the same on every machine.
        text: the bytes, unchanged; they need not be UTF-8.
        origin: the name in messages about changed text, for example the path of its file.
    """

    name: str
    text: bytes
    origin: str = "the source"


class SourceSpec(Spec):
    """A source of documents, in an order that never changes."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """Read the documents of one split, one at a time.

        Raises:
            DataError: a file is missing, unreadable or malformed.
        """

    def relative_to(self, folder: Path) -> Self:
        """The same source with relative paths resolved against `folder`, usually that of the run file."""
        return self


sources = Registry("source", SourceSpec)
"""Every kind of source, by name."""

Source = Annotated[SourceSpec, sources]
"""A field that holds any source."""


def split_of(name: str, held_out_share: float) -> Split:
    """The split of a document, decided by the SHA-256 of its name alone.

    The split does not depend on the seed, on the order, or on the other documents. A document that is held out
    at one share is held out at every larger share.
    """
    digest = sha256(name.encode(errors="surrogateescape")).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out_share * 2**64 else "train"
