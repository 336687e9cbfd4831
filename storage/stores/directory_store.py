"""The store in a local or shared directory.

A change opens the root once and does everything below that handle, so that it happens in one directory or not at all, whatever
is moved, removed or put in its place meanwhile. Nothing below the root is followed through a link.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from storage.errors import DamagedError, ReplacedError
from storage.stores import handles
from storage.stores.location import join

MAX_OBJECT = 1 << 30  # bytes that are read of one object at most; a user of few says fewer
_NO_STAMP = (0, 0, 0, 0, 0)


@dataclass(slots=True)
class _Held:
    """An object that must stay as it is while anything is changed."""

    key: str
    data: bytes
    stamp: tuple[int, ...] = field(default=_NO_STAMP)  # of the file, when it was last compared


class DirectoryStore:
    """A store in a directory whose path has no links. Unfinished files lie in `scratch`, on its file system, until named."""

    def __init__(self, root: Path, scratch: str) -> None:
        self.root = root
        self._root = str(root)
        self._scratch = scratch
        self._held: _Held | None = None

    def path(self, key: str) -> Path:
        """Return where an object lies."""
        return self.root / key

    def address(self, key: str) -> str:
        """Return an object's path, for messages."""
        return join(self._root, key)

    # Reading

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        """Return an object's bytes. Raises FileNotFoundError; DamagedError above `limit`, and for what is no regular file."""
        return handles.read(self._at(key), limit)[0]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes of an object, fewer at its end. Raises FileNotFoundError, DamagedError."""
        with handles.regular_file(self._at(key)) as (handle, _):
            return os.pread(handle, length, start)

    def get_many(self, keys: Iterable[str], limit: int = MAX_OBJECT) -> Iterator[bytes]:
        """Yield the bytes of many objects in order. Raises FileNotFoundError, DamagedError."""
        return (self.get(key, limit) for key in keys)

    def size(self, key: str) -> int:
        """Return an object's length in bytes. Raises FileNotFoundError, DamagedError."""
        with handles.regular_file(self._at(key)) as (_, status):
            return status.st_size

    def exists(self, key: str) -> bool:
        """Tell whether an object exists, or anything else has its name."""
        return handles.exists(self._at(key))

    def list(self, prefix: str) -> list[str]:
        """Return the sorted names directly below a prefix; empty where there is no such prefix. Raises DamagedError."""
        try:
            with handles.directory(self._at(prefix)) as handle:
                return sorted(os.listdir(handle))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self) -> dict[str, int]:
        """Return the regular files directly below the root, each with its length in bytes."""
        found = {}
        with handles.directory(self._root) as handle, os.scandir(handle) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # gone in between
                    if stat.S_ISREG((status := entry.stat(follow_symlinks=False)).st_mode):
                        found[entry.name] = status.st_size
        return found

    def directories(self, prefix: str) -> Sequence[str]:
        """Return the sorted names of the directories directly below a prefix; links are not followed."""
        try:
            with handles.directory(self._at(prefix)) as handle, os.scandir(handle) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except (OSError, DamagedError):  # no such directory, or none that we may look into
            return []

    @contextmanager
    def local_copy(self, key: str) -> Iterator[Path]:
        """Yield where an object lies. Raises FileNotFoundError, DamagedError."""
        self.size(key)
        yield self.path(key)

    # Changing

    def hold(self, key: str, data: bytes) -> None:
        """From now on change nothing unless the object `key` has this content: every change raises ReplacedError else."""
        self._held = _Held(key, data)

    def check(self) -> None:
        """Raise ReplacedError where the object that is held has another content, or is gone."""
        with self._changing():
            pass

    def put_new(self, key: str, data: bytes) -> bool:
        """Create an object; return False, changing nothing, where it exists already."""
        with self._changing(make=True) as root, self._scratched(root) as (scratch, temporary):
            _write_synced(temporary, scratch, data)
            return self._name(root, temporary, key, scratch)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        with self._changing(make=True) as root, self._scratched(root) as (scratch, temporary):
            _write_synced(temporary, scratch, data)
            with self._parent(root, key, make=True) as (parent, name):
                os.replace(temporary, name, src_dir_fd=scratch, dst_dir_fd=parent)
                os.fsync(parent)

    @contextmanager
    def partial(self) -> Iterator[Path]:
        """Yield a new path for unfinished content; whatever is left there at the end is removed."""
        with self._changing(make=True) as root, self._scratched(root) as (scratch, temporary):
            # By its handle: what writes to a path follows no link that somebody puts in place of the directory.
            yield Path(f"/proc/self/fd/{scratch}/{temporary}")

    def publish(self, temporary: Path, key: str) -> bool:
        """Make a finished file of `partial` the object `key`; return False where the object exists already."""
        with self._changing(make=True) as root:
            return self._name(root, str(temporary), key)

    def delete_partials(self, older_than: float) -> None:
        """Remove the unfinished files that nobody has written to for `older_than` seconds: a killed process left them."""
        with suppress(FileNotFoundError), self._changing() as root, handles.directory(self._scratch, root) as scratch:
            if not (names := [name for name in os.listdir(scratch) if name.endswith(".partial")]):
                return
            os.utime(scratch)  # to the file server's clock: by our own, if it is ahead, files in the making would go
            limit = os.fstat(scratch).st_mtime - older_than
            for name in names:
                with suppress(FileNotFoundError):
                    if os.stat(name, dir_fd=scratch, follow_symlinks=False).st_mtime < limit:
                        os.unlink(name, dir_fd=scratch)

    def move(self, key: str, target: str) -> None:
        """Give an object another key, if it is there."""
        with (
            _if_there(),
            self._changing(make=True) as root,
            self._parent(root, key) as (here, old),
            self._parent(root, target, make=True) as (there, new),
        ):
            os.rename(old, new, src_dir_fd=here, dst_dir_fd=there)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        with _if_there(), self._changing() as root, self._parent(root, key) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def delete_directory(self, prefix: str) -> None:
        """Remove a directory of objects, if it is there."""
        with _if_there(), self._changing() as root, self._parent(root, prefix) as (parent, name):
            with handles.directory(name, parent) as directory:
                for entry in os.listdir(directory):
                    with suppress(FileNotFoundError, IsADirectoryError):
                        os.unlink(entry, dir_fd=directory)
            with suppress(OSError):  # not empty again: a late result, which the next sweep removes
                os.rmdir(name, dir_fd=parent)

    @contextmanager
    def _changing(self, *, make: bool = False) -> Iterator[int]:
        """Yield the root's handle to change something below it. Only where nothing is held is the root made."""
        if make and self._held is None:
            os.makedirs(self.root, exist_ok=True)
        try:
            root = handles.open_directory(self._root)
        except FileNotFoundError:
            if self._held is None:
                raise
            raise ReplacedError(f"{self._root} is gone: the run was removed or moved") from None
        try:
            if self._held is not None:
                self._compare(self._held, root)
            yield root
        finally:
            os.close(root)

    def _compare(self, held: _Held, root: int) -> None:
        address = self.address(held.key)
        try:
            if _stamp(os.stat(held.key, dir_fd=root, follow_symlinks=False)) == held.stamp:
                return
            data, status = handles.read(held.key, len(held.data), root)
        except (FileNotFoundError, NotADirectoryError):
            raise ReplacedError(f"{address} is gone: the run was removed or moved") from None
        except DamagedError as error:
            raise ReplacedError(f"{address} is not what it was: {error}") from None
        if data != held.data:
            raise ReplacedError(f"{address} is not what it was: another run was begun there")
        held.stamp = _stamp(status)

    @contextmanager
    def _scratched(self, root: int) -> Iterator[tuple[int, str]]:
        """Yield the scratch directory's handle and a new name there; what is left under that name at the end is removed."""
        with handles.directory(self._scratch, root, make=True) as scratch:
            name = f"{os.getpid()}-{secrets.token_hex(6)}.partial"
            try:
                yield scratch, name
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=scratch)

    @contextmanager
    def _parent(self, root: int, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Yield the handle of the directory that an object lies in, and its name there."""
        above, _, name = _checked(key).rpartition("/")
        with handles.directory(above or ".", root, make=make) as parent:
            yield parent, name

    def _name(self, root: int, temporary: str, key: str, scratch: int | None = None) -> bool:
        with self._parent(root, key, make=True) as (parent, name):
            if created := handles.name_new(temporary, name, parent, scratch):
                os.fsync(parent)
            return created

    def _at(self, key: str) -> str:
        return join(self._root, _checked(key))


def _checked(key: str) -> str:
    """Return a key if it leads to something below the root. Raises DamagedError: it came from a file of somebody else's."""
    if "\0" in key or (key and not {"", ".", ".."}.isdisjoint(key.split("/"))):
        raise DamagedError(f"{key!r} is no name of a file in a run")
    return key


def _if_there() -> AbstractContextManager[None]:
    return suppress(FileNotFoundError, NotADirectoryError)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _write_synced(name: str, at: int, data: bytes) -> None:
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=at)
    try:
        written = os.write(handle, data)
        while written < len(data):  # a signal, or a disk that is full: then the next call raises
            written += os.write(handle, memoryview(data)[written:])
        os.fsync(handle)
    finally:
        os.close(handle)
