"""The vectors of a part while it is written: datasets first, then their chunks column by column.

A column is one field over all questions: `query_token_representation/layer_21`. HDF5 gives a chunk the next free bytes
of the file when it is written, and by then every other object has its place; so a column's chunks follow one another, and a
reader of one layer reads one run of the file. The column index says where each chunk came to lie, as the file itself reports it.
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
from storage.columns import Index
from storage.objects import create_group

_NO_CACHE = h5p.create(h5p.DATASET_ACCESS)
_NO_CACHE.set_chunk_cache(1, 0, 1.0)  # else 64 KB of hash table for every dataset that is opened


@dataclass(slots=True)
class _Chunk:
    """A distinct vector: the path of its dataset, its bytes until they are written, its row of the index after that."""

    path: bytes
    dimensions: int
    data: bytes
    row: tuple[int, int, int] | None = None


class Placement:
    """Takes a part's vectors, compressed and each distinct one once, and writes them when all are there."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._chunks: dict[tuple[str, bytes], _Chunk] = {}
        self._keys: list[str] = []
        self._columns: dict[str, dict[str, _Chunk]] = {}

    def add(self, group: Any, key: str, vectors: dict[str, npt.NDArray[Any]]) -> None:
        """Create the datasets of a question's vectors in its group; one that the column has already is linked."""
        self._keys.append(key)
        parents = {"": group}
        for field, vector in vectors.items():
            parent, _, name = field.rpartition("/")
            if parent not in parents:
                parents[parent] = create_group(group, parent)
            chunk = self._add(parents[parent], key, field, name.encode(), raw(vector))
            self._columns.setdefault(field, {})[key] = chunk

    def _add(self, parent: Any, key: str, field: str, name: bytes, vector: npt.NDArray[Any]) -> _Chunk:
        content = hashlib.sha256(vector.view(np.uint8).data)
        content.update(f"{vector.dtype} {vector.shape}".encode())
        identity = field, content.digest()  # by content, never by image id; within a column, which stays in one piece
        if chunk := self._chunks.get(identity):
            h5o.link(h5o.open(self._file, chunk.path), parent, name)
            return chunk
        chunk = _Chunk(f"{key}/{field}".encode(), vector.ndim, encode_chunk(vector))
        h5d.create(parent, name, h5t.IEEE_F32LE, *_layout(vector.shape), None, _NO_CACHE)
        self._chunks[identity] = chunk
        return chunk

    def write(self) -> dict[str, Index]:
        """Write the chunks; return the index of each column, a row for each question in the order of the keys."""
        keys = sorted(self._keys)  # as HDF5 lists them: by their bytes, which in UTF-8 is by their code points
        return {
            field: np.array(
                [self._write(column[key]) if key in column else (0, 0, 0) for key in keys], np.uint64
            ).reshape(-1, 3)
            for field, column in self._columns.items()
        }

    def _write(self, chunk: _Chunk) -> tuple[int, int, int]:
        if chunk.row is None:
            dataset = h5d.open(self._file, chunk.path, _NO_CACHE)
            dataset.write_direct_chunk((0,) * chunk.dimensions, chunk.data)
            stored = dataset.get_chunk_info(0)
            chunk.row = stored.byte_offset, stored.size, CODEC.crc32(chunk.data)
            chunk.data = b""
        return chunk.row


def check_placed(path: Path, columns: dict[str, Index]) -> None:
    """Read every chunk by its row of the index. Raises OSError where the file does not hold it there."""
    with path.open("rb", buffering=0) as file:
        for field, index in columns.items():
            for offset, size, crc in np.unique(index, axis=0).tolist():
                file.seek(offset)
                if CODEC.crc32(file.read(size)) != crc:
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
