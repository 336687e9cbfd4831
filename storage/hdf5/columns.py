"""Column reads: one layer of a part by one read of the file, past HDF5. Format: docs/format.md, "The column index"."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.errors import ADVICE, DamagedError, UserError
from storage.fields import is_of_image, is_ragged
from storage.hdf5.chunks import CODEC, Planes, join_planes, read_planes
from storage.hdf5.layout import Part, open_part
from storage.hdf5.trouble import named
from storage.naming import group_key
from storage.stores.object_file import BLOCK, File, on_this_machine, open_raw

COLUMN = "column:"  # the attribute `column:FIELD` at the root is the index of a column
Index = npt.NDArray[np.uint64]  # [N, 3]: byte offset, stored size, crc32 of the stored bytes; N questions in key order
Vectors = npt.NDArray[np.float32]
_SMALL_GAP = 65536  # reading over it is cheaper than a second read
_BYTES_AT_ONCE = 1 << 25  # of answers' tokens
_ROWS_AT_ONCE = 16  # their values stay in the processor's cache
_SLACK = 1024  # bytes by which a chunk may be longer than its values: of a deflate stream's blocks


@dataclass(frozen=True, slots=True)
class Column:
    """One field of a part: where each question's vector lies, or those of its answer's tokens. Holds no open file."""

    path: File
    field: str
    ids: list[str]  # of the questions that have it, in key order
    width: int
    index: Index | None  # None: a part without an index, whose datasets are read one by one
    lengths: list[int] | None = None  # of the answers in tokens, where each has a vector

    def read(self) -> Vectors:
        """Return all rows, [N, D]. Raises UserError for a row of another width, DamagedError where bytes were changed."""
        return self.read_rows(range(len(self.ids)))

    def pieces(self) -> Iterator[Vectors]:
        """Yield all vectors, some at a time: all rows at once, or the tokens of an answer."""
        if self.lengths is not None:
            yield from self.read_each(range(len(self.ids)))
        elif self.ids:
            yield self.read()

    def read_each(self, rows: Sequence[int]) -> Iterator[Vectors]:
        """Yield the vectors of some answers' tokens, each [T, D]."""
        assert self.lengths is not None and self.index is not None
        sizes = np.cumsum(self.index[list(rows), 1].astype(np.int64))
        for some in np.split(np.asarray(rows, np.intp), np.flatnonzero(np.diff(sizes // _BYTES_AT_ONCE)) + 1):
            chunks = read_runs(self.path, self.index[some])
            for row in some.tolist():
                planes = self._planes(chunks, row, self.index[row])
                yield join_planes([planes], self._size(row)).reshape(self.lengths[row], self.width)

    def _size(self, row: int) -> int:
        return self.width if self.lengths is None else self.width * self.lengths[row]

    def read_rows(self, rows: Sequence[int]) -> Vectors:
        """Return some rows, [len(rows), D]."""
        values = np.empty((len(rows), self.width), np.float32)
        self.read_into(values, range(len(rows)), rows)
        return values

    def read_into(self, values: Vectors, places: Sequence[int], rows: Sequence[int]) -> None:
        """Put some rows at the given places of an array."""
        if self.index is None:
            self._read_datasets(values, places, rows)
        else:
            self._read_chunks(values, places, rows, self.index[list(rows)])

    def _read_datasets(self, values: Vectors, places: Sequence[int], rows: Sequence[int]) -> None:
        with on_this_machine(self.path) as path, open_part(path) as part:
            for place, row in zip(places, rows, strict=True):
                vector = part.question(group_key(self.ids[row])).vector(self.field)
                if vector is None:
                    raise UserError(f"{self._where(row)}: there is no {self.field}")
                if vector.shape != (self.width,):
                    raise UserError(f"{self._where(row)}: {self.field} is not of width {self.width}: {vector.shape}")
                values[place] = vector.read()

    def _read_chunks(self, values: Vectors, places: Sequence[int], rows: Sequence[int], index: Index) -> None:
        chunks = read_runs(self.path, index)
        _, first, same = np.unique(index[:, 0], return_index=True, return_inverse=True)
        place = np.fromiter(places, np.intp, len(places))
        for start in range(0, len(first), _ROWS_AT_ONCE):
            some = first[start : start + _ROWS_AT_ONCE]
            planes = [self._planes(chunks, rows[k], index[k]) for k in some.tolist()]
            values[place[some]] = join_planes(planes, self.width)
        if (again := first[same] != np.arange(len(rows))).any():  # questions of one image share their chunks
            values[place[again]] = values[place[first[same][again]]]

    def _planes(self, chunks: dict[int, memoryview], row: int, index_row: Index) -> Planes:
        offset, _, crc = index_row.tolist()
        if CODEC.crc32(chunks[offset]) != crc:
            raise DamagedError(f"{self._where(row)}: {self.field} is damaged (CRC-32); {ADVICE}")
        try:
            return read_planes(chunks[offset], self._size(row))
        except ValueError as error:
            raise UserError(f"{self._where(row)}: {self.field} is not of width {self.width}: {error}") from error

    def _where(self, row: int) -> str:
        return f"{self.path}, question {self.ids[row]}"


def column_of(part: Part, field: str) -> Column:
    """Return a field of an open part. Raises UserError where a question lacks it, DamagedError."""
    if not part.keys:
        return Column(part.path, field, [], 0, None)
    index, ids = _index(part, field), part.ids
    if index is not None and not index[:, 1].all():
        for row in np.flatnonzero(index[:, 1] == 0).tolist():
            _refuse_lost(part, field, row)
        there = np.flatnonzero(index[:, 1])
        index, ids = index[there], [ids[row] for row in there]
    if not ids:
        raise UserError(f"{part.path}: no question has {field}")
    if index is not None and max(int(index[:, :2].max()), int(index[:, :2].sum(axis=1).max())) > part.size:
        raise DamagedError(f"{part.path} is shorter than its column index says; {ADVICE}")
    first = part.question(group_key(ids[0])).vector(field)
    if first is None:
        raise UserError(f"{part.path}, question {ids[0]}: there is no {field}")
    width, lengths = first.shape[-1], _lengths(part, field, ids, index) if is_ragged(field) else None
    part.allow_vectors(len(ids) if lengths is None else sum(lengths), width, field)
    # A chunk is inflated whole: one that is longer than its values would take a thousand times its length.
    most = width * max(lengths or [1])
    if index is not None and int(index[:, 1].max()) > 4 * most + most // 64 + _SLACK:
        raise part.refusal(COLUMN + field, f"names longer chunks than {most:,} values need")
    return Column(part.path, field, ids, width, index, lengths)


def _lengths(part: Part, field: str, ids: Sequence[str], index: Index | None) -> list[int]:
    """Return how many tokens each answer has."""
    if index is None:
        raise UserError(f"{part.path}: {field} has no column index: read it with h5py, as docs/format.md says")
    found = []
    for question in ids:
        vector = part.question(group_key(question)).vector(field)
        if vector is None:
            raise DamagedError(f"{part.path}, question {question}: {field} is in the column index alone; {ADVICE}")
        found.append(vector.shape[0])
    return found


def _refuse_lost(part: Part, field: str, row: int) -> None:
    """Raise UserError where a question lacks a vector that it must have, DamagedError where the index lacks it."""
    question, where = part.question(part.keys[row]), f"{part.path}, question {part.ids[row]}"
    if question.vector(field) is not None:
        raise DamagedError(f"{where}: {field} is not in the column index; {ADVICE}")
    if not is_of_image(field) or question.texts().get("image_id"):
        raise UserError(f"{where}: there is no {field}")


def _index(part: Part, field: str) -> Index | None:
    index = part.attribute(COLUMN + field)
    if index is None:
        return None
    if np.shape(index) != (len(part.keys), 3):
        shape = f"the shape {np.shape(index)}, not ({len(part.keys)}, 3)"
        raise DamagedError(f"{part.path}: the index of {field} has {shape}; {ADVICE}")
    if index.dtype != np.uint64:
        raise part.refusal(COLUMN + field, f"is of {index.dtype}, not of uint64")
    return np.asarray(index)


def read_index(part: Part) -> dict[str, Index]:
    """Return the index of every column of an open part; empty where it has none."""
    names = (name for name in part.attribute_names() if name.startswith(COLUMN))
    return {name.removeprefix(COLUMN): part.attribute(name) for name in names}


def read_runs(path: File, index: Index) -> dict[int, memoryview]:
    """Return the bytes at each offset, read in as few runs as they lie in: one, in a part as we write it."""
    chunks: dict[int, memoryview] = {}
    gap = _SMALL_GAP if isinstance(path, Path) or path.copy else BLOCK
    with named(path, "it cannot be read"), open_raw(path) as file:
        length = file.seek(0, os.SEEK_END)
        rows = [(offset, size) for offset, size in np.unique(index[:, :2], axis=0).tolist()]
        if rows and max(offset + size for offset, size in rows) > length:
            raise DamagedError(f"{path} is shorter than its column index says; {ADVICE}")
        for run in _runs(rows, gap):
            start, end = run[0][0], max(offset + size for offset, size in run)
            file.seek(start)
            data = memoryview(file.read(end - start) or b"")
            chunks |= {offset: data[offset - start : offset - start + size] for offset, size in run}
    return chunks


def _runs(rows: list[tuple[int, int]], gap: int) -> list[list[tuple[int, int]]]:
    """Return ascending chunks in groups that are worth one read each: small gaps are read over."""
    runs: list[list[tuple[int, int]]] = []
    for offset, size in rows:
        if runs and offset - sum(runs[-1][-1]) <= gap:
            runs[-1].append((offset, size))
        else:
            runs.append([(offset, size)])
    return runs
