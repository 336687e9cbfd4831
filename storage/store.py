"""The store: every read and write of a run directory goes through these few operations.

Keys are `/`-separated paths relative to the root. Objects appear whole or not at all, so a reader never sees a half-written
one. The operations are those that an object store has too (create-only PUT, GET, LIST, DELETE).
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryStore:
    """A store in a local or shared directory. Unfinished files lie in `scratch`, on the same file system, until named."""

    def __init__(self, root: Path, scratch: str) -> None:
        self.root = root
        self.scratch = root / scratch

    def path(self, key: str) -> Path:
        """Return where an object lies."""
        return self.root / key

    def get(self, key: str) -> bytes:
        """Return an object's bytes. Raises FileNotFoundError."""
        return self.path(key).read_bytes()

    def exists(self, key: str) -> bool:
        """Tell whether an object exists."""
        return self.path(key).exists()

    def list(self, prefix: str) -> list[str]:
        """Return the sorted names directly below a prefix; empty where there is no such prefix."""
        try:
            return sorted(os.listdir(self.path(prefix)))
        except (FileNotFoundError, NotADirectoryError):
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
