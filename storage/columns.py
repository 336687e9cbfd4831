"""Column reads: one layer of a part by one read of the file, past HDF5. Format: docs/format.md, "The column index"."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from storage.chunks import CODEC, decode_chunk, join_planes
from storage.errors import DamagedError, UserError
from storage.naming import question_id

COLUMN = "column:"  # the attribute `column:FIELD` at the root is the index of a column
Index = npt.NDArray[np.uint64]  # [N, 3]: byte offset, stored size, crc32 of the stored bytes; N questions in key order
_SMALL_GAP = 65536  # reading over it is cheaper than a second read


def read_column(path: Path, field: str) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Return the question ids of a part in key order, and one of its fields as float32 [N, D].

    Without an index the datasets are read one by one, with the same result: ten times slower. Raises UserError where a
    question lacks the field or has another width, DamagedError where a chunk is not what was written.
    """
    with h5py.File(path, "r") as file:
        keys = list(file)
        index = file.attrs.get(COLUMN + field)
        if index is None or not keys:
            vectors = [_one(file, key, field) for key in keys]
        else:
            width = _one_width(file, keys, field, index)
    ids = [question_id(key) for key in keys]
    if index is None or not keys:
        if len({vector.shape for vector in vectors}) > 1:
            raise UserError(f"{path}: {field} has several widths: {sorted({v.shape for v in vectors})}")
        return ids, np.stack(vectors) if vectors else np.empty((0, 0), np.float32)
    return ids, _read(path, field, ids, index, width)


def read_index(file: h5py.File) -> dict[str, Index]:
    """Return the index of every column of an open part; empty where it has none."""
    return {name.removeprefix(COLUMN): file.attrs[name] for name in file.attrs if name.startswith(COLUMN)}


def _one(file: h5py.File, key: str, field: str) -> npt.NDArray[np.float32]:
    if field not in file[key]:
        raise UserError(f"{file.filename}, question {question_id(key)}: there is no {field}")
    values: npt.NDArray[np.float32] = file[key][field][:].astype(np.float32, copy=False)
    return values


def _one_width(file: h5py.File, keys: list[str], field: str, index: Index) -> int:
    if index.shape != (len(keys), 3):
        raise DamagedError(f"{file.filename}: the index of {field} has the shape {index.shape}, not ({len(keys)}, 3)")
    if not index[:, 1].all():
        key = keys[int(np.argmin(index[:, 1] > 0))]
        raise UserError(f"{file.filename}, question {question_id(key)}: there is no {field}")
    shape = file[keys[0]][field].shape
    if len(shape) != 1:
        raise UserError(f"{file.filename}: {field} has {len(shape)} dimensions, not one")
    return int(shape[0])


def _read(path: Path, field: str, ids: list[str], index: Index, width: int) -> npt.NDArray[np.float32]:
    values = np.empty((len(ids), width), np.float32)
    chunks = _read_chunks(path, index)
    decoded: dict[int, int] = {}  # offset to the first row that has it: questions of one image share their chunks
    for row, (offset, _, crc) in enumerate(index.tolist()):
        if (first := decoded.setdefault(offset, row)) != row:
            values[row] = values[first]
            continue
        if CODEC.crc32(chunks[offset]) != crc:
            raise DamagedError(f"{path}, question {ids[row]}: {field} is damaged (CRC-32); try `storage verify`")
        try:
            join_planes(decode_chunk(chunks[offset], width), values[row])
        except ValueError as error:
            raise UserError(f"{path}, question {ids[row]}: {field} is not of width {width}: {error}") from error
    return values


def _read_chunks(path: Path, index: Index) -> dict[int, memoryview]:
    """Return the bytes at each offset, read in as few runs as they lie in: one, in a part as we write it."""
    chunks: dict[int, memoryview] = {}
    with path.open("rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        rows = [(offset, size) for offset, size in np.unique(index[:, :2], axis=0).tolist()]
        if rows and max(offset + size for offset, size in rows) > length:
            raise DamagedError(f"{path} is shorter than its column index says; try `storage verify`")
        for run in _runs(rows):
            start, end = run[0][0], max(offset + size for offset, size in run)
            data = memoryview(os.pread(file.fileno(), end - start, start))
            chunks |= {offset: data[offset - start : offset - start + size] for offset, size in run}
    return chunks


def _runs(rows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return ascending chunks in groups that are worth one read each: small gaps are read over."""
    runs: list[list[tuple[int, int]]] = []
    for offset, size in rows:
        if runs and offset - sum(runs[-1][-1]) <= _SMALL_GAP:
            runs[-1].append((offset, size))
        else:
            runs.append([(offset, size)])
    return runs
