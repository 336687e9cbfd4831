"""An object as a file: what somebody reads of it is fetched, in pieces of 64 KB, and the rest is not."""

from __future__ import annotations

import io
from typing import BinaryIO

from storage.location import split_url
from storage.object_store import ObjectStore

_PIECE = 1 << 16  # the headers of nearly all images; a JPEG's may hold a preview that is larger


def open_object(url: str) -> tuple[BinaryIO, int]:
    """Return an object as a file, and its size. Raises FileNotFoundError, ObjectStoreError; so does reading."""
    bucket, key = split_url(url)
    file = _ObjectFile(ObjectStore(bucket), key)
    return io.BufferedReader(file, _PIECE), file.size


class _ObjectFile(io.RawIOBase):
    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key, self._at = store, key, 0
        self._start, self.size = store.get_start(key, _PIECE)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._fetch(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._fetch(self.size)  # in one request, where the base class would make one for each 8 KB

    def _fetch(self, length: int) -> bytes:
        end = min(self._at + length, self.size)
        data = self._start[self._at : end]
        if (at := self._at + len(data)) < end:
            data += self._store.get_range(self._key, at, end - at)
        self._at += len(data)
        return data
