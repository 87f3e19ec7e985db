"""Documents from JSON Lines files (jsonlines.org), compressed or not: each line is an object with a "text"."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from fusiontree.data.compressed import plain_name, reading
from fusiontree.data.source import DataError, Document, Share, SourceSpec, Split, sources, split_of

File = Annotated[str, Field(strict=True, min_length=1)]
"""The path of a file."""
Files = File | Annotated[tuple[File, ...], Field(min_length=1)]
"""The path of one file, or of several."""


@sources.register
class JsonLines(SourceSpec):
    """Files of lines `{"text": "..."}`. Other keys, blank lines and a byte order mark are ignored.

    Files compressed by gzip or zstd are decompressed; zstd needs `fusiontree[data]`. The name of a document is
    `file:line`, where `file` is the last path component without `.gz` or `.zst`. Moving the folder or
    compressing a file therefore leaves every document in its split.

    Attributes:
        train: the files for training.
        held_out: the files for measurement; without them, a share of the documents in `train`.
        held_out_share: the share of documents held out of `train`; not used if `held_out` names files.
    """

    kind: Literal["jsonl"] = "jsonl"
    train: Files
    held_out: Files | None = None
    held_out_share: Share = 0.05

    def documents(self, split: Split) -> Iterator[Document]:
        """Read the documents of one split, one line at a time, files and lines in order.

        Raises:
            DataError: a file cannot be read or is cut, or a line is not a JSON object with a string "text".
        """
        if self.held_out is not None:
            yield from _read_all(self.train if split == "train" else self.held_out)
            return
        for document in _read_all(self.train):
            if split_of(document.name, self.held_out_share) == split:
                yield document

    def relative_to(self, folder: Path) -> Self:
        held_out = None if self.held_out is None else _below(folder, self.held_out)
        return self.model_copy(update={"train": _below(folder, self.train), "held_out": held_out})


def _below(folder: Path, files: Files) -> Files:
    if isinstance(files, str):
        return str(folder / files)
    return tuple(str(folder / file) for file in files)


def _read_all(files: Files) -> Iterator[Document]:
    for file in [files] if isinstance(files, str) else files:
        yield from _read(Path(file))


def _read(path: Path) -> Iterator[Document]:
    name = plain_name(path)
    with reading(path) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if line.strip():
                yield Document(f"{name}:{number}", _text(line, f"{path}:{number}"), origin=str(path))


def _text(line: bytes, where: str) -> bytes:
    found = _parse(line, where)
    if not isinstance(found, dict):
        raise DataError(f'{where}: must be an object with a "text", found {_name_of(found)}')
    if "text" not in found:
        keys = ", ".join(map(repr, found)) or "none"
        raise DataError(f'{where}: has no "text" (its keys: {keys:.100})')
    if not isinstance(found["text"], str):
        raise DataError(f'{where}: "text" must be a string, found {_name_of(found["text"])}')
    try:
        return found["text"].encode()
    except UnicodeEncodeError as error:
        raise DataError(f'{where}: "text" holds a lone surrogate at character {error.start}') from None


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON: {error.msg}: column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number with too many digits, or nesting too deep
        raise DataError(f"{where}: is not JSON: {error}") from None


def _name_of(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
