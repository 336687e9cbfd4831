"""The vectors of a part while it is written: everything else first, then their datasets and chunks column by column.

A column is one field over all questions: `query_token_representation/layer_21`. HDF5 gives a chunk the next free bytes
of the file when it is written. So a column's chunks follow one another, and a reader of one layer reads one run of the file, if
nothing else takes bytes in between: the datasets' headers, which arise at the same time, have a block set aside for them.
The column index says where each chunk came to lie, as the file itself reports it.

States of all of an answer's tokens are megabytes for each question: they are written as they come, each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5py import h5d, h5o, h5p, h5s, h5t

from storage.errors import DamagedError
from storage.fields import is_ragged
from storage.hdf5.chunks import CODEC, encode_chunk, raw
from storage.hdf5.columns import Index, read_runs
from storage.hdf5.objects import create_group

_AT_ONCE = 1 << 26  # bytes of chunks that are looked at together
_HEADER_SIZE = 300  # of a dataset's object header with its share of the group's; measured


@dataclass(slots=True)
class _Chunk:
    """A distinct vector of a column: its bytes until they are written, then its dataset and its place."""

    shape: tuple[int, ...]
    data: bytes
    path: bytes = b""
    offset: int = 0
    size: int = 0
    crc: int = 0
    placed: bool = False  # it is in the file already


class Placement:
    """Takes a part's vectors, compressed and each distinct one once, and writes them when all are there."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[str, int, int, tuple[int, ...]], _Chunk] = {}
        self._keys: list[str] = []
        self._columns: dict[str, dict[str, _Chunk]] = {}

    def add(self, group: Any, key: str, vectors: dict[str, npt.NDArray[Any]]) -> None:
        """Take a question's vectors, and make the groups that they will be in. Raises ValueError where one is empty."""
        for parent in sorted({parent for field in vectors for parent in _parents(field)}):
            create_group(group, parent)
        for field, vector in vectors.items():
            try:
                column = self._columns.setdefault(field, {})
                column[key] = _written(group, field, raw(vector)) if is_ragged(field) else self._chunk(field, raw(vector))
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from error
        self._keys.append(key)

    def _chunk(self, field: str, vector: npt.NDArray[Any]) -> _Chunk:
        # By content, never by image id; and within a column only, so that it stays in one piece. Python's SipHash and the
        # CRC-32 are 96 bits, at half of SHA-256's time: two of a part's vectors meet by chance with a probability of 1e-22.
        data = vector.tobytes()
        identity = field, hash(data), CODEC.crc32(data), vector.shape
        chunk = self._chunks.get(identity)
        if chunk is None:
            chunk = self._chunks[identity] = _Chunk(vector.shape, encode_chunk(vector))
        return chunk

    @property
    def metadata_size(self) -> int:
        """Bytes for `meta_block_size`: what the datasets' headers will take at least, and a little more."""
        return max(2048, _HEADER_SIZE * len(self._chunks))

    def write(self, file: Any) -> dict[str, Index]:
        """Write the datasets; return the index of each column, a row for each question in the order of the keys."""
        keys = sorted(self._keys)  # as HDF5 lists them: by their bytes, which in UTF-8 is by their code points
        return {field: _write_column(file, field, keys, column) for field, column in self._columns.items()}


def _parents(field: str) -> Iterator[str]:
    """Yield the groups that a field lies in, the outermost first."""
    steps = field.split("/")[:-1]
    return ("/".join(steps[:number]) for number in range(1, len(steps) + 1))


def _written(group: Any, field: str, vectors: npt.NDArray[Any]) -> _Chunk:
    """Write a question's vectors now."""
    data = encode_chunk(vectors)
    dataset = h5d.create(group, field.encode(), h5t.IEEE_F32LE, *_layout(vectors.shape))
    dataset.write_direct_chunk((0,) * vectors.ndim, data)
    place = dataset.get_chunk_info(0)
    return _Chunk(vectors.shape, b"", offset=place.byte_offset, size=place.size, crc=CODEC.crc32(data), placed=True)


def _write_column(file: Any, field: str, keys: list[str], column: dict[str, _Chunk]) -> Index:
    distinct: list[_Chunk] = []
    dataset = None
    for key in keys:
        if (chunk := column.get(key)) is None or chunk.placed:
            continue
        path = f"{key}/{field}".encode()
        if chunk.path:
            h5o.link(h5o.open(file, chunk.path), file, path)
            continue
        dataset = h5d.create(file, path, h5t.IEEE_F32LE, *_layout(chunk.shape))
        dataset.write_direct_chunk((0,) * len(chunk.shape), chunk.data)
        chunk.path, chunk.size, chunk.crc = path, len(chunk.data), CODEC.crc32(chunk.data)
        chunk.data = b""
        distinct.append(chunk)
    _locate(file, distinct, dataset)
    missing = 0, 0, 0
    rows = [(c.offset, c.size, c.crc) if (c := column.get(key)) is not None else missing for key in keys]
    return np.array(rows, np.uint64).reshape(-1, 3)


def _locate(file: Any, chunks: list[_Chunk], last: Any) -> None:
    """Ask the file where a column's chunks came to lie: its last one, and the others only if they are not in one piece.

    To ask is a tenth of writing a dataset. `check_placed` looks at every chunk.
    """
    if not chunks:
        return
    end = last.get_chunk_info(0).byte_offset + chunks[-1].size
    start = end - sum(chunk.size for chunk in chunks)
    if h5d.open(file, chunks[0].path).get_chunk_info(0).byte_offset == start:
        for chunk in chunks:
            chunk.offset, start = start, start + chunk.size
    else:
        for chunk in chunks:
            chunk.offset = h5d.open(file, chunk.path).get_chunk_info(0).byte_offset


def check_placed(path: Path, columns: dict[str, Index]) -> None:
    """Read every chunk by its row of the index. Raises OSError where the file does not hold it there."""
    for field, index in columns.items():
        rows = np.unique(index, axis=0)
        for some in np.split(rows, np.flatnonzero(np.diff(np.cumsum(rows[:, 1]) // _AT_ONCE)) + 1):
            try:
                chunks = read_runs(path, some)
            except DamagedError as error:
                raise OSError(f"{path}: a chunk of {field} is beyond the end") from error
            for offset, _, crc in some.tolist():
                if CODEC.crc32(chunks[offset]) != crc:
                    raise OSError(f"{path}: a chunk of {field} is not at byte {offset}")


@lru_cache(maxsize=64)
def _layout(shape: tuple[int, ...]) -> tuple[Any, Any]:
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk(shape)
    properties.set_shuffle()
    properties.set_deflate(1)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    return h5s.create_simple(shape), properties
