"""Real text that every machine has: the source code of Python's standard library."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fusiontree.data.source import DataError, Document, Share, SourceSpec, Split, sources, split_of

_SKIPPED = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}


@sources.register
class StandardLibrary(SourceSpec):
    """The `*.py` files of the running interpreter's standard library: some 11 MB of source in Python 3.11.

    Installed packages and test folders are left out. So is `pydoc_data`, a generated manual in one string that
    would outweigh all other held-out text. A document is a whole file with unchanged bytes; its name is the path
    below the library. The text depends on the Python version, so compare figures within one version only. The
    files are not independent (`encodings` holds near copies), which helps every model alike.

    Attributes:
        held_out_share: the part of the files, not of the bytes, that is held out.
    """

    kind: Literal["stdlib"] = "stdlib"
    held_out_share: Share = 0.05

    def documents(self, split: Split) -> Iterator[Document]:
        """Read the files of one split, sorted by name.

        Raises:
            DataError: a file cannot be read.
        """
        root = Path(sysconfig.get_path("stdlib"))
        for name in _file_names(root):
            if split_of(name, self.held_out_share) == split:
                yield Document(name, _read(root / name), origin=f"the standard library in {root}")


def _file_names(root: Path) -> list[str]:
    paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    return sorted(path.as_posix() for path in paths if _SKIPPED.isdisjoint(path.parts))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
