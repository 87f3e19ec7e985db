"""Small files that are written completely or not at all."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader finds the old text or the new text, never a part.

    Raises:
        OSError: the file cannot be written; the old text stays, and nothing is left of the new text.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, data: Any) -> None:
    """Replace a file by plain data as JSON; numbers read back unchanged."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Plain data from a file."""
    return json.loads(path.read_text(encoding="utf-8"))
