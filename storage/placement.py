"""The vectors of a part while it is written: everything else first, then their datasets and chunks column by column.

A column is one field over all questions: `query_token_representation/layer_21`. HDF5 gives a chunk the next free bytes
of the file when it is written. So a column's chunks follow one another, and a reader of one layer reads one run of the file, if
nothing else takes bytes in between: the datasets' headers, which arise at the same time, have a block set aside for them.
The column index says where each chunk came to lie, as the file itself reports it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5py import h5d, h5o, h5p, h5s, h5t

from storage.chunks import CODEC, encode_chunk, raw
from storage.columns import Index, read_runs
from storage.errors import DamagedError
from storage.objects import create_group

_HEADER_SIZE = 300  # of a dataset's object header with its share of the group's; measured
_NO_CACHE = h5p.create(h5p.DATASET_ACCESS)
_NO_CACHE.set_chunk_cache(1, 0, 1.0)  # else 64 KB of hash table for every dataset that is opened


@dataclass(slots=True)
class _Chunk:
    """A distinct vector of a column: its bytes until they are written, its dataset and its row of the index after that."""

    shape: tuple[int, ...]
    data: bytes
    path: bytes = b""
    row: tuple[int, int, int] | None = None


class Placement:
    """Takes a part's vectors, compressed and each distinct one once, and writes them when all are there."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[str, bytes, tuple[int, ...]], _Chunk] = {}
        self._keys: list[str] = []
        self._columns: dict[str, dict[str, _Chunk]] = {}

    def add(self, group: Any, key: str, vectors: dict[str, npt.NDArray[Any]]) -> None:
        """Take a question's vectors, and make the groups that they will be in. Raises ValueError where one is empty."""
        for parent in sorted({parent for field in vectors if (parent := field.rpartition("/")[0])}):
            create_group(group, parent)
        for field, vector in vectors.items():
            try:
                self._columns.setdefault(field, {})[key] = self._chunk(field, raw(vector))
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from error
        self._keys.append(key)

    def _chunk(self, field: str, vector: npt.NDArray[Any]) -> _Chunk:
        # By content, never by image id; and within a column only, so that it stays in one piece.
        identity = field, hashlib.sha256(vector.view(np.uint8).data).digest(), vector.shape
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
        missing = 0, 0, 0
        return {
            field: np.array(
                [_write(file, f"{key}/{field}", column[key]) if key in column else missing for key in keys], np.uint64
            ).reshape(-1, 3)
            for field, column in self._columns.items()
        }


def _write(file: Any, name: str, chunk: _Chunk) -> tuple[int, int, int]:
    path = name.encode()
    if chunk.row is not None:
        h5o.link(h5o.open(file, chunk.path), file, path)
        return chunk.row
    dataset = h5d.create(file, path, h5t.IEEE_F32LE, *_layout(chunk.shape), None, _NO_CACHE)
    dataset.write_direct_chunk((0,) * len(chunk.shape), chunk.data)
    stored = dataset.get_chunk_info(0)
    chunk.path, chunk.row = path, (stored.byte_offset, stored.size, CODEC.crc32(chunk.data))
    chunk.data = b""
    return chunk.row


def check_placed(path: Path, columns: dict[str, Index]) -> None:
    """Read every chunk by its row of the index. Raises OSError where the file does not hold it there."""
    for field, index in columns.items():
        try:
            chunks = read_runs(path, index)
        except DamagedError as error:
            raise OSError(f"{path}: a chunk of {field} is beyond the end") from error
        for offset, _, crc in np.unique(index, axis=0).tolist():
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
