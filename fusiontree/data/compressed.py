"""Files of lines, compressed or not. The format is detected from the first bytes, not from the name."""

import gzip
import io
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fusiontree.data.source import DataError

ENDINGS = (".gz", ".zst")


def plain_name(path: Path) -> str:
    """The name of a file without a compression ending: `a.jsonl` for `folder/a.jsonl.gz`."""
    return path.stem if path.suffix in ENDINGS else path.name


@contextmanager
def reading(path: Path) -> Generator[IO[bytes]]:
    """Open a file for reading; its bytes are decompressed as they are read.

    Raises:
        DataError: the file cannot be read, is damaged or cut, or its compression is not supported.
    """
    try:
        with path.open("rb") as file:
            yield _opened(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: is compressed, and damaged or cut: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _opened(file: Any, path: Path) -> IO[bytes]:
    start = file.peek(4)
    return next((opened(file, path) for magic, opened in _FORMATS.items() if start.startswith(magic)), file)


def _gzip(file: IO[bytes], path: Path) -> IO[bytes]:
    return gzip.GzipFile(fileobj=file)  # pyright: ignore[reportReturnType]


def _other(file: IO[bytes], path: Path) -> IO[bytes]:
    raise DataError(f"{path}: is compressed by bzip2 or xz; gzip and zstd are read")


def _zstd(file: IO[bytes], path: Path) -> IO[bytes]:
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        found = "is compressed by zstd, and zstandard is not installed"
        raise DataError(f"{path}: {found}; pip install 'fusiontree[data]'") from None
    return io.BufferedReader(_Frames(file, zstandard.ZstdDecompressor().decompressobj))


class _Frames(io.RawIOBase):
    """The contents of zstd frames in order. (zstandard's own reader accepts a truncated file as complete.)"""

    def __init__(self, file: IO[bytes], frame: Callable[[], Any]) -> None:
        self.file, self.new, self.frame, self.left = file, frame, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            data = self._compressed()
            if not data:
                return 0
            self.left = self._decompressed(data)
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size

    def _compressed(self) -> bytes:
        unused = b"" if self.frame is None or not self.frame.eof else self.frame.unused_data
        data = unused or self.file.read(1 << 17)
        if not data and self.frame is not None and not self.frame.eof:
            raise EOFError("it ends within a frame")
        return data

    def _decompressed(self, data: bytes) -> bytes:
        if self.frame is None or self.frame.eof:
            self.frame = self.new()
        try:
            return self.frame.decompress(data)
        except Exception as error:  # zstandard.ZstdError; its module may not be installed
            raise EOFError(error) from None


_FORMATS: dict[bytes, Callable[[IO[bytes], Path], IO[bytes]]] = {
    b"\x1f\x8b": _gzip,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\x50\x2a\x4d\x18": _zstd,  # a skippable frame, which pzstd writes first
    b"BZh": _other,
    b"\xfd7zX": _other,
}
