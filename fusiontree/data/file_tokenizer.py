"""Tokenizers that the package `tokenizers` (the extra `data`) reads from a `tokenizer.json` beside a model."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from fusiontree.data.tokenizer import ByteTokenizer
from fusiontree.data.tokenizer_files import tokenizer_files
from fusiontree.errors import FusionTreeError

FILE = "tokenizer.json"
STARTS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
ENDS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|end|>", "[EOS]")
"""Common spellings of end tokens; used if no file beside the tokenizer names one, like `STARTS` for start tokens."""
CONTEXT = 8
"""The number of preceding tokens with which a new token is decoded."""


class FileTokenizer:
    """A `tokenizer.json`, with the start and end tokens from the files beside it.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`.
        vocab_size: the largest token id plus 1.
        start: the token before a text: from the files, else a special token in `STARTS`, else None.
        ends: the tokens that end a text, the main one first: from the files, else one in `ENDS`, else none.
    """

    def __init__(self, directory: Path | str) -> None:
        """Read the files.

        Raises:
            FusionTreeError: `tokenizers` is not installed, or a file cannot be read.
        """
        folder = Path(directory)
        self.tokenizer: Any = _read(folder)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values(), default=-1)
        notes = [_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        ids = _json(folder / "generation_config.json").get("eos_token_id")
        named = [vocabulary.get(_content(note.get("eos_token"))) for note in notes]
        listed = [*named, *(ids if isinstance(ids, list) else [ids])]
        ends = dict.fromkeys(token for token in listed if isinstance(token, int) and 0 <= token < self.vocab_size)
        self.ends: tuple[int, ...] = tuple(ends) or self._special(ENDS)
        starts = [vocabulary.get(_content(note.get("bos_token"))) for note in notes]
        self.start: int | None = next((token for token in [*starts, *self._special(STARTS)] if token is not None), None)

    def _special(self, names: Sequence[str]) -> tuple[int, ...]:
        """The id of the first name that is a special token, as a tuple; empty if none is."""
        added = self.tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        return tuple(special[name] for name in names if name in special)[:1]

    def encode(self, text: str | bytes) -> Int64[np.ndarray, " time"]:
        """The tokens of a text, with the special tokens that the tokenizer adds to every text.

        Raises:
            FusionTreeError: the text is not UTF-8.
        """
        try:
            whole = text.decode() if isinstance(text, bytes) else text.encode().decode()
        except UnicodeError:
            raise FusionTreeError("text: not UTF-8, which a tokenizer of text needs") from None
        return np.array(self.tokenizer.encode(whole).ids, dtype=np.int64)

    def decode(self, tokens: Integer[np.ndarray, " time"] | Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def pieces(self, before: Sequence[int], tokens: Iterable[int]) -> Iterator[bytes]:
        """The UTF-8 bytes that new tokens add to a text. Tokens that are parts of one character give one piece."""
        context = list(before)[-CONTEXT:]
        shown = self.decode(context)
        for token in tokens:
            context.append(token)
            whole = self.decode(context)
            if not whole.endswith("\ufffd"):
                yield whole[len(shown) :].encode()
                context = context[-CONTEXT:]
                shown = self.decode(context)
        yield self.decode(context)[len(shown) :].encode()


def tokenizer_in(directory: Path | str, vocab_size: int) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of a saved model: from the files beside it, else the byte tokenizer.

    Raises:
        FusionTreeError: there are no files and the vocabulary is not that of bytes, the files cannot be read, or the
            tokenizer has more tokens than the model.
    """
    names = [file.name for file in tokenizer_files(directory) if file.name.startswith(("tokenizer.", "vocab."))]
    if not names and vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    if FILE not in names:
        found = f"found {', '.join(names)}, which AutoTokenizer and its save_pretrained turn into one" if names else ""
        found = found or f"{vocab_size} tokens are not the {ByteTokenizer.vocab_size} of bytes"
        raise FusionTreeError(f"{directory}: holds no {FILE}, and {found}")
    tokenizer = FileTokenizer(directory)
    if tokenizer.vocab_size > vocab_size:
        text = f"has {tokenizer.vocab_size} tokens, the model has {vocab_size}"
        raise FusionTreeError(f"{directory}: the tokenizer {text}")
    return tokenizer


def _read(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        text = f"{folder / FILE}: tokenizers is not installed; pip install 'fusiontree[data]'"
        raise FusionTreeError(text) from None
    try:
        found: Any = Tokenizer.from_file(str(folder / FILE))
    except Exception as error:  # tokenizers raises plain exceptions
        raise FusionTreeError(f"{folder}: its tokenizer cannot be read: {error}") from None
    found.no_truncation()  # a truncation set by a training script would cut the prompt
    found.no_padding()
    return found


def _json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FusionTreeError(f"{file}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise FusionTreeError(f"{file}: expected a mapping, found {found!r:.60}")
    return found


def _content(token: Any) -> Any:
    """The text of a special token. The files hold it as a string or as `content` in a mapping."""
    return token.get("content") if isinstance(token, dict) else token
