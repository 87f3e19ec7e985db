"""Bytes as tokens: no vocabulary to train, no text that it cannot write, bits per byte with no conversion."""

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
    """How many tokens there are."""
    end: ClassVar[int] = 256
    """The token after a document's last byte."""

    ends: ClassVar[tuple[int, ...]] = (end,)
    """The tokens that end a text."""

    def encode(self, text: str | bytes) -> UInt16[np.ndarray, " time"]:
        """The bytes of a text (UTF-8 if it is a str), one token each, with no end token. Bytes that Python could
        not decode, and that a str therefore carries as lone surrogates (PEP 383), come out as they were."""
        data = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def decode_bytes(self, tokens: Integer[np.ndarray, " time"]) -> bytes:
        """The bytes behind tokens; end tokens are left out."""
        return tokens[tokens != self.end].astype(np.uint8).tobytes()

    def pieces(self, before: Sequence[int], tokens: Iterable[int]) -> Iterator[bytes]:
        """What each new token adds to a text: its byte."""
        yield from (b"" if token == self.end else bytes([token]) for token in tokens)

    def decode(self, tokens: Integer[np.ndarray, " time"]) -> str:
        """The text behind tokens; end tokens are left out, and what is not UTF-8 reads U+FFFD."""
        return self.decode_bytes(tokens).decode(errors="replace")
