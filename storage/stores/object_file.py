"""An object as a file: a part in an object store, of which a reader takes what it needs by ranges, or all at once."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from storage.errors import LayoutError
from storage.stores.location import split_url
from storage.stores.store import Store, local_file, open_store

# What is read of a part of 1000 questions (44 MB) to open it lies in 7 blocks of this size or in 21 of a quarter of it, and a
# request takes as long as some hundred KB.
BLOCK = 1 << 20
_BLOCKS = 16  # kept of an open file
_HEADER = 1 << 16  # holds the headers of nearly all images; a JPEG's may have a preview in it that is larger


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """An object that is read where it lies, or from its copy on this machine. Holds nothing open: it may be pickled."""

    url: str
    length: int | None = None  # in bytes; None where nobody has asked yet
    copy: Path | None = None

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.url.rpartition("/")[2]

    def is_file(self) -> bool:
        """Tell whether the object exists."""
        store, key = self.place()
        return store.exists(key)

    def place(self) -> tuple[Store, str]:
        """Return its store and key."""
        bucket, key = split_url(self.url)
        return open_store(bucket), key


File = Path | ObjectFile


def size_of(file: File) -> int:
    """Return a file's length in bytes. Raises FileNotFoundError, ObjectStoreError."""
    if isinstance(file, Path):
        return file.stat().st_size
    store, key = file.place()
    return store.size(key) if file.length is None else file.length


def open_raw(file: File) -> io.RawIOBase:
    """Open a file for reading, unbuffered. Raises FileNotFoundError, ObjectStoreError; LayoutError for a pipe or a device."""
    if isinstance(file, ObjectFile) and file.copy is None:
        return _Ranges(*file.place(), size_of(file))
    return _open_regular(file if isinstance(file, Path) else cast(Path, file.copy))


def _open_regular(path: Path) -> io.FileIO:
    """Open a file by a handle that cannot block: a pipe of that name would keep a reader for ever."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise _not_regular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_regular(path)
    return io.FileIO(handle)


def _not_regular(path: Path) -> LayoutError:
    return LayoutError(path, "it", "is no regular file")


@contextmanager
def on_this_machine(file: File) -> Iterator[File]:
    """Yield a file that is read on this machine until the end of the block: an object is fetched. Raises UserError."""
    if isinstance(file, Path) or file.copy is not None:
        yield file
        return
    with local_file(file.url) as copy:
        yield replace(file, copy=copy)


def open_image(url: str) -> tuple[BinaryIO, int]:
    """Return an image's object as a file, of which what is read is fetched, and its length. Its header takes one request.

    Raises FileNotFoundError, ObjectStoreError; so does reading.
    """
    from storage.stores.object_store import ObjectStore

    bucket, key = split_url(url)
    store = ObjectStore(bucket)
    start, size = store.get_start(key, _HEADER)
    return io.BufferedReader(_Ranges(store, key, size, _HEADER, start), _HEADER), size


class _Ranges(io.RawIOBase):
    """An open object: small reads by blocks, of which the last few are kept, large ones as they are."""

    def __init__(self, store: Store, key: str, size: int, block: int = BLOCK, first: bytes | None = None) -> None:
        self._store, self._key = store, key
        self._size, self._at = size, 0
        self._length = block
        self._blocks: OrderedDict[int, bytes] = OrderedDict({} if first is None else {0: first})

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        length = max(0, min(len(view), self._size - self._at))
        if not length:
            return 0
        block = self._length
        if length > block:
            data = self._store.get_range(self._key, self._at, length)
        else:
            start, end = self._at, self._at + length
            blocks = [self._block(number) for number in range(start // block, -(-end // block))]
            data = b"".join(blocks)[start % block : start % block + length]
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = bytearray(max(0, self._size - self._at))  # one read: the base class makes one for each 8 KB
        self.readinto(data)
        return bytes(data)

    def _block(self, number: int) -> bytes:
        data = self._blocks.get(number)
        if data is None:
            start = number * self._length
            data = self._store.get_range(self._key, start, min(self._length, self._size - start))
            self._blocks[number] = data
            if len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return data
