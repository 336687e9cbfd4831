"""The store: every read and write of a run goes through these few operations, in a directory or in an object store.

Keys are `/`-separated paths relative to the root. Objects appear whole or not at all, so a reader never sees a half-written
one. The operations are those that an object store has (create-only PUT, GET, LIST, DELETE).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from storage.errors import UserError
from storage.stores.directory_store import MAX_OBJECT, DirectoryStore
from storage.stores.location import is_url, split_url

SCRATCH = ".run/tmp"  # where a run has its unfinished files
__all__ = ["SCRATCH", "DirectoryStore", "Store", "local_file", "missing_objects", "open_store", "some_objects", "sync"]


class Store(Protocol):
    """What a run needs of the place it lies in. Where that is away for a moment, every operation raises OSError.

    What is there but is no object (a link, a FIFO, a directory), or is larger than asked for, raises DamagedError.
    """

    def address(self, key: str) -> str:
        """Return an object's path or URL, for messages."""

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        """Return an object's bytes; DamagedError, unread, where they are more than `limit`. Raises FileNotFoundError."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes of an object, fewer at its end. Raises FileNotFoundError."""

    def get_many(self, keys: Iterable[str], limit: int = MAX_OBJECT) -> Iterator[bytes]:
        """Yield the bytes of many objects in order, several fetched at once where that is faster."""

    def size(self, key: str) -> int:
        """Return an object's length in bytes. Raises FileNotFoundError."""

    def exists(self, key: str) -> bool:
        """Tell whether an object exists."""

    def list(self, prefix: str) -> list[str]:
        """Return the sorted names directly below a prefix, "" being the root; empty where there is no such prefix."""

    def sizes(self) -> dict[str, int]:
        """Return the objects directly below the root, each with its length in bytes, by one listing."""

    def directories(self, prefix: str) -> Sequence[str]:
        """Return those of the names that have others below them."""

    def hold(self, key: str, data: bytes) -> None:
        """From now on change nothing unless the object `key` has this content: every change raises ReplacedError else."""

    def check(self) -> None:
        """Raise ReplacedError where the object that is held has another content, or is gone."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Create an object; return False, changing nothing, where it exists already."""

    def put(self, key: str, data: bytes) -> None:
        """Create or replace an object."""

    def partial(self) -> AbstractContextManager[Path]:
        """Yield a new path for unfinished content on this machine; whatever is left there at the end is removed."""

    def publish(self, temporary: Path, key: str) -> bool:
        """Make a finished file of `partial` the object `key`; return False where the object exists already."""

    def delete_partials(self, older_than: float) -> None:
        """Remove the unfinished files that nobody has written to for `older_than` seconds: a killed process left them."""

    def local_copy(self, key: str) -> AbstractContextManager[Path]:
        """Yield a path with an object's content on this machine, to be read only. Raises FileNotFoundError."""

    def move(self, key: str, target: str) -> None:
        """Give an object another key, if it is there."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def delete_directory(self, prefix: str) -> None:
        """Remove the objects directly below a prefix, and the prefix with them."""


def open_store(location: str | Path, scratch: str = SCRATCH) -> Store:
    """Return the store at a resolved location. `scratch`: where in a directory unfinished files lie."""
    if is_url(location):
        from storage.stores.object_store import ObjectStore

        return ObjectStore(str(location))
    return DirectoryStore(Path(location), scratch)


@contextmanager
def local_file(location: str) -> Iterator[Path]:
    """Yield a path with the content of the file or object at a location. Raises UserError where a URL has no object."""
    if not is_url(location):
        yield Path(location)
        return
    bucket, key = split_url(location)
    with ExitStack() as stack:
        try:
            path = stack.enter_context(open_store(bucket).local_copy(key))
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
        yield path


def missing_objects(root: str, urls: Collection[str]) -> set[str]:
    """Return those of some URLs below the URL `root` that no object has."""
    from storage.stores.object_store import ObjectStore

    keys = {url[len(root) + 1 :]: url for url in urls}
    return {keys[key] for key in ObjectStore(root).missing(keys)}


def some_objects(root: str, limit: int) -> Sequence[str]:
    """Return at most so many keys of the objects below the URL `root`."""
    from storage.stores.object_store import ObjectStore

    return ObjectStore(root).some(limit)


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
