"""The store: every read and write of a run goes through these few operations, in a directory or in an object store.

Keys are `/`-separated paths relative to the root. Objects appear whole or not at all, so a reader never sees a half-written
one. The operations are those that an object store has (create-only PUT, GET, LIST, DELETE).
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from storage.errors import UserError
from storage.location import is_url, join, split_url

SCRATCH = ".run/tmp"  # where a run has its unfinished files
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Store(Protocol):
    """What a run needs of the place it lies in. Where that is away for a moment, every operation raises OSError."""

    def address(self, key: str) -> str:
        """Return an object's path or URL, for messages."""

    def get(self, key: str) -> bytes:
        """Return an object's bytes. Raises FileNotFoundError."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes of an object, fewer at its end. Raises FileNotFoundError."""

    def get_many(self, keys: Iterable[str]) -> Iterator[bytes]:
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
        from storage.object_store import ObjectStore

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
    from storage.object_store import ObjectStore

    keys = {url[len(root) + 1 :]: url for url in urls}
    return {keys[key] for key in ObjectStore(root).missing(keys)}


def some_objects(root: str, limit: int) -> Sequence[str]:
    """Return at most so many keys of the objects below the URL `root`."""
    from storage.object_store import ObjectStore

    return ObjectStore(root).some(limit)


class DirectoryStore:
    """A store in a local or shared directory. Unfinished files lie in `scratch`, on the same file system, until named."""

    def __init__(self, root: Path, scratch: str) -> None:
        self.root = root
        self.scratch = root / scratch

    def path(self, key: str) -> Path:
        """Return where an object lies."""
        return self.root / key

    def address(self, key: str) -> str:
        """Return an object's path, for messages."""
        return join(str(self.root), key)

    def get(self, key: str) -> bytes:
        """Return an object's bytes. Raises FileNotFoundError."""
        return self.path(key).read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes of an object, fewer at its end. Raises FileNotFoundError."""
        with self.path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def get_many(self, keys: Iterable[str]) -> Iterator[bytes]:
        """Yield the bytes of many objects in order. Raises FileNotFoundError."""
        return map(self.get, keys)

    def size(self, key: str) -> int:
        """Return an object's length in bytes. Raises FileNotFoundError."""
        return self.path(key).stat().st_size

    def exists(self, key: str) -> bool:
        """Tell whether an object exists."""
        return self.path(key).exists()

    def list(self, prefix: str) -> list[str]:
        """Return the sorted names directly below a prefix; empty where there is no such prefix."""
        try:
            return sorted(os.listdir(self.path(prefix)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self) -> dict[str, int]:
        """Return the files directly below the root, each with its length in bytes."""
        found = {}
        with os.scandir(self.root) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # gone in between
                    if stat.S_ISREG((status := entry.stat()).st_mode):
                        found[entry.name] = status.st_size
        return found

    def directories(self, prefix: str) -> Sequence[str]:
        """Return the sorted names of the directories directly below a prefix; links are not followed."""
        try:
            with os.scandir(self.path(prefix)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError:  # no such directory, or none that we may look into
            return []

    def put_new(self, key: str, data: bytes) -> bool:
        """Create an object; return False, changing nothing, where it exists already."""
        with self.partial() as temporary:
            _write_synced(temporary, data)
            return self.publish(temporary, key)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.partial() as temporary:
            _write_synced(temporary, data)
            os.replace(temporary, target)
            sync(target.parent)

    def publish(self, temporary: Path, key: str) -> bool:
        """Make a finished file of `partial` the object `key`; return False where the object exists already."""
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        created = _link_new(temporary, target)
        if created:
            sync(target.parent)
        return created

    @contextmanager
    def partial(self) -> Iterator[Path]:
        """Yield a new path for unfinished content; whatever is left there at the end is removed."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        temporary = self.scratch / f"{os.getpid()}-{secrets.token_hex(6)}.partial"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def delete_partials(self, older_than: float) -> None:
        """Remove the unfinished files that nobody has written to for `older_than` seconds: a killed process left them."""
        paths = list(self.scratch.glob("*.partial"))
        if not paths:
            return
        os.utime(self.scratch)  # to the file server's clock: by our own, if it is ahead, files in the making would go
        limit = self.scratch.stat().st_mtime - older_than
        for path in paths:
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < limit:
                    path.unlink()

    @contextmanager
    def local_copy(self, key: str) -> Iterator[Path]:
        """Yield where an object lies. Raises FileNotFoundError."""
        path = self.path(key)
        path.stat()  # where it cannot be looked at, it is not gone: `exists` would say so of some errors
        yield path

    def move(self, key: str, target: str) -> None:
        """Give an object another key, if it is there."""
        self.path(target).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.rename(self.path(key), self.path(target))

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        self.path(key).unlink(missing_ok=True)

    def delete_directory(self, prefix: str) -> None:
        """Remove a directory of objects, if it is there."""
        for name in self.list(prefix):
            self.delete(f"{prefix}/{name}")
        with suppress(OSError):  # gone already, or not empty again: a late result, which the next sweep removes
            self.path(prefix).rmdir()


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link_new(source: Path, target: Path) -> bool:
    """Give `source` the name `target` unless that exists."""
    try:
        os.link(source, target)
        return True
    except FileExistsError:
        # A retried link() over NFS may report EEXIST although the first try made it: then both names are one inode.
        return os.path.samestat(source.stat(), target.stat())
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    if _libc.renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    raise OSError(code, os.strerror(code), str(target))
