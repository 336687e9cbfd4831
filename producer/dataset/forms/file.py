"""A file that is read from its beginning to its end, once, and its digest with it."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from storage.errors import UserError
from storage.images.filetype import refuse_pointer

_BUFFER = 1 << 16


class Digested(io.RawIOBase):
    """A file of which the digest is taken as it is read."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; return how many."""
        number = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:number])
        self.size += number
        return number


@contextmanager
def opened_file(path: Path) -> Iterator[tuple[BinaryIO, Digested]]:
    """Yield a table's file, gzip unpacked, and what has been read of it; read it to its end. Raises UserError."""
    try:
        with path.open("rb", buffering=0) as raw, io.BufferedReader(digested := Digested(raw), _BUFFER) as data:
            refuse_pointer(data.peek(), path)
            if data.peek(4).startswith(b"PAR1"):
                raise UserError(f"{path} is a Parquet file: give it a name that ends in .parquet")
            plain: Any = gzip.GzipFile(fileobj=data) if path.suffix.lower() == ".gz" else data
            yield plain, digested
            while data.read(_BUFFER):  # what lies behind a gzip's end belongs to the file, too
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged gzip ({error}): copy or make it again; `gzip -t` checks it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def as_utf8(data: BinaryIO) -> TextIO:
    """Return a file as text. A byte that is not UTF-8 becomes a surrogate, which the check of its row finds."""
    # newline: csv asks for it, so that a line break inside quotes stays what it is.
    return io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="")


class TableFile:
    """What tables in one file have in common."""

    image: str | None = None
    line = "line"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sha256 = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return os.path.getsize(self._path)
