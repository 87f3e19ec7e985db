"""A record of a split as it was read: sizes and hashes by file, to detect and name files that changed."""

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
        hash: SHA-256 over the length and the text of each document.
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
        """Plain data. A path is cut to its last component, so that the data may be moved."""
        name = PurePath(self.origin).name
        return {"name": name, "documents": self.documents, "bytes": self.bytes, "sha256": self.hash.hexdigest()}


class Contents:
    """The places that a split was read from, in order. The cost is one hash of the text used; nothing is read twice."""

    def __init__(self) -> None:
        self.parts: list[PlaceContents] = []

    def add(self, document: Document) -> None:
        """Count one more document."""
        if not self.parts or self.parts[-1].origin != document.origin:
            self.parts.append(PlaceContents(document.origin))
        self.parts[-1].add(document.text)

    def data(self) -> list[dict[str, Any]]:
        """Plain data, one mapping per place."""
        return [part.data() for part in self.parts]

    def difference(self, before: Sequence[Mapping[str, Any]]) -> str | None:
        """A message about the first place that differs from the record `before`; None if all are the same."""
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
