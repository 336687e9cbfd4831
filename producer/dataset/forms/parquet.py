"""Parquet, by pyarrow: a file, or a folder of shards, as the Hugging Face hub has them. Row by row: images may lie in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from producer.dataset.faults import Faults
from producer.dataset.forms.row import Opened, Row
from producer.show.progress import Done
from storage.errors import UserError

_ROWS = 32  # at a time: with images of megabytes too
_BUFFER = 1 << 20
_CHUNK = 1 << 22


class Parquet:
    """A `.parquet`, or a folder of them in the order of their names."""

    image: str | None = None
    line = "row"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]

    @cached_property
    def sha256(self) -> str:
        """The digest of the file, or of the files' digests: read by who asks, as the table itself is not read in order."""
        digests = [_sha256(file) for file in self._files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Rows."""
        return sum(self._opened(file).metadata.num_rows for file in self._files)

    @contextmanager
    def opened(self, faults: Faults, done: Done) -> Iterator[Opened]:
        """Read the table; a row's place is its number in all files."""
        columns: list[str] = self._opened(self._files[0]).schema_arrow.names
        for file in self._files[1:]:
            if (others := self._opened(file).schema_arrow.names) != columns:
                raise UserError(f"{file} has other columns than {self._files[0].name} ({', '.join(map(str, others[:20]))})")
        yield Opened("its schema", list(columns), self._rows(done))

    def _rows(self, done: Done) -> Iterator[Row]:
        number = 0
        for file in self._files:
            try:
                for batch in self._opened(file).iter_batches(batch_size=_ROWS, use_threads=False):
                    for cells in batch.to_pylist():
                        number += 1
                        yield Row(f"row {number}", cells)
                    done(number)
            except (OSError, ValueError) as error:  # pyarrow's errors are of these
                raise UserError(f"{file} is damaged after row {number} ({_first_line(error)}): fetch it again") from error

    def _opened(self, file: Path) -> Any:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise UserError(f"{file}: to read Parquet, install pyarrow: pip install 'halp-extractor[parquet]'") from error
        try:
            return ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)  # pages as they are needed
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is no Parquet file, or a damaged one ({_first_line(error)}): fetch it again") from error


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as data:
            while chunk := data.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
