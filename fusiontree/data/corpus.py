"""Documents as one array of tokens, and a stream that reads them in any order of documents."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from jaxtyping import Int64, Integer, UInt16

from fusiontree.data.contents import Contents
from fusiontree.data.source import DataError, Document
from fusiontree.data.tokenizer import ByteTokenizer


@dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of a split in source order, each followed by the end token. A token takes two bytes of memory.

    Attributes:
        tokens: every document's tokens and its end token, one after another.
        starts: the index in `tokens` where each document starts; the last entry is the length of `tokens`.
        tokenizer: the tokenizer that made the tokens.
        contents: a record of the documents as they were read.
    """

    tokens: UInt16[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, "documents+1"]
    tokenizer: ByteTokenizer
    contents: Contents = field(default_factory=Contents)

    @classmethod
    def read(cls, documents: Iterable[Document], *, named: str = "the source") -> Self:
        """Tokenise documents one at a time.

        Raises:
            DataError: the documents hold no text; the message starts with `named`.
        """
        tokenizer, contents, buffer, starts = ByteTokenizer(), Contents(), bytearray(), [0]
        for document in documents:
            contents.add(document)
            buffer += tokenizer.encode(document.text).tobytes()
            buffer += np.uint16(tokenizer.end).tobytes()
            starts.append(len(buffer) // 2)
        tokens = np.frombuffer(buffer, dtype=np.uint16)
        corpus = cls(tokens, np.array(starts, dtype=np.int64), tokenizer, contents)
        if not corpus.bytes:
            raise DataError(f"{named} has no text: found {corpus.documents} documents with 0 bytes")
        return corpus

    def text(self, document: int) -> bytes:
        """The bytes of one document."""
        return self.tokenizer.decode_bytes(self.tokens[self.starts[document] : self.starts[document + 1]])

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.starts) - 1

    @property
    def bytes(self) -> int:
        """The number of bytes of text, without end tokens."""
        return len(self.tokens) - self.documents


class Stream:
    """The documents of a corpus in some order. Any index can be read; the reordered tokens are never copied.

    Attributes:
        corpus: the documents.
        order: the index of the document that comes first, second, ...
    """

    def __init__(self, corpus: Corpus, order: Int64[np.ndarray, " documents"]) -> None:
        self.corpus, self.order = corpus, order
        self._starts = np.concatenate([[0], np.cumsum(np.diff(corpus.starts)[order])])

    def read(
        self, index: Integer[np.ndarray, "*shape"]
    ) -> tuple[Int64[np.ndarray, "*shape"], Int64[np.ndarray, "*shape"]]:
        """The tokens at indices of the stream, and the index of each token in its document."""
        place = np.searchsorted(self._starts, index, side="right") - 1
        within = index - self._starts[place]
        found = self.corpus.tokens[self.corpus.starts[self.order[place]] + within]
        return found.astype(np.int64), within
