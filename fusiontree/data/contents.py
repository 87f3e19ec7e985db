"""What a split was when it was read, by file: sizes and hashes, so that data that changed can be told and named."""

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import zip_longest
from pathlib import PurePath
from typing import Any

from fusiontree.data.source import Document


@dataclass
class PlaceContents:
    """A record of the documents of a split that come from one place.

    Attributes:
        origin: the source's name of the place, for example the path of a file.
        documents: the number of documents read.
        bytes: the length of their text.
        hash: over each document's length and text.
    """

    origin: str
    documents: int = 0
    bytes: int = 0
    hash: Any = field(default_factory=sha256)

    def add(self, text: builtins.bytes) -> None:
        """Count one more document."""
        self.documents, self.bytes = self.documents + 1, self.bytes + len(text)
        self.hash.update(len(text).to_bytes(8, "little"))
        self.hash.update(text)

    def data(self) -> dict[str, Any]:
        """Plain data; of a path only the last component, so that data may be moved."""
        name = PurePath(self.origin).name
        return {"name": name, "documents": self.documents, "bytes": self.bytes, "sha256": self.hash.hexdigest()}


class Contents:
    """The places that a split was read from, in order. It costs a hash of the text that is used and no more reading."""

    def __init__(self) -> None:
        self.parts: list[PlaceContents] = []

    def add(self, document: Document) -> None:
        """Count one more document."""
        if not self.parts or self.parts[-1].origin != document.origin:
            self.parts.append(PlaceContents(document.origin))
        self.parts[-1].add(document.text)

    def data(self) -> list[dict[str, Any]]:
        """Plain data, a mapping a place."""
        return [part.data() for part in self.parts]

    def difference(self, before: Sequence[Mapping[str, Any]]) -> str | None:
        """The first difference from the recorded contents, as `place: recorded, found`; None if there is none."""
        for part, then in zip_longest(self.parts, before):
            now = None if part is None else part.data()
            if now != then:
                place = then["name"] if part is None else part.origin
                return f"{place}: was read as {_said(then)}, is now {_said(now)}"
        return None


def _said(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "nothing"
    return f"{part['documents']:,} documents of {part['bytes']:,} bytes (sha256 {part['sha256'][:12]})"
