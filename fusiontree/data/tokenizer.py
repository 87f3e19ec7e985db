"""Bytes as tokens: no vocabulary to train, every text can be encoded, and bits per byte need no conversion."""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Integer, UInt16


class ByteTokenizer:
    """Tokens 0..255 are the bytes; token 256 ends a document.

    The byte vocabulary is that of ByT5 (arXiv:2105.13626), with one special token instead of three.

    >>> tokens = ByteTokenizer().encode("h\\u00e9")
    >>> tokens.tolist(), ByteTokenizer().decode(tokens)
    ([104, 195, 169], 'h\\xe9')
    """

    vocab_size: ClassVar[int] = 257
    """The size of the vocabulary."""
    end: ClassVar[int] = 256
    """The token after a document's last byte."""

    ends: ClassVar[tuple[int, ...]] = (end,)
    """The tokens that end a text."""

    def encode(self, text: str | bytes) -> UInt16[np.ndarray, " time"]:
        """The bytes of a text (UTF-8 if it is a str), one token each, without an end token. Lone surrogates, in which
        a str carries bytes that Python could not decode (PEP 383), give the original bytes."""
        data = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def decode_bytes(self, tokens: Integer[np.ndarray, " time"]) -> bytes:
        """The bytes of tokens, without end tokens."""
        return tokens[tokens != self.end].astype(np.uint8).tobytes()

    def pieces(self, before: Sequence[int], tokens: Iterable[int]) -> Iterator[bytes]:
        """The byte of each new token; empty for an end token."""
        yield from (b"" if token == self.end else bytes([token]) for token in tokens)

    def decode(self, tokens: Integer[np.ndarray, " time"]) -> str:
        """The text of tokens, without end tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode(errors="replace")
