"""Handles: what lies below a directory is opened through no link, and is a regular file before it is read.

A path is a name, and what it names may be replaced by somebody else at any moment. What a handle names stays.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from storage.errors import DamagedError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Opening a FIFO waits for a writer, and a terminal may become ours, without these.
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_RENAME = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}  # with RENAME_NOREPLACE, as many FUSE file systems say
NEITHER = "its file system has neither hard links nor renaming that replaces nothing: choose a directory on another one"
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_OPENAT2, _RESOLVE_NO_SYMLINKS = 437, 4  # the same number on each processor; from Linux 5.6 on
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_HOWS = {flags: ctypes.byref(_How(flags, 0, _RESOLVE_NO_SYMLINKS)) for flags in (_DIRECTORY, _READ, _LOOK)}
_HOW_SIZE = ctypes.sizeof(_How)


def _open(path: str, flags: int, at: int | None = None) -> int:
    """Open what there is at a path below a handle, or at an absolute one. Raises OSError; DamagedError where it has a link."""
    try:
        number = _openat2(path, flags, at)
        return _open_by_steps(path, flags, at) if number is None else number
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedError(f"{path} is a link, or lies behind one: nothing in a run is followed through a link") from None
        raise


def _openat2(path: str, flags: int, at: int | None) -> int | None:
    """Open in one call; None where the kernel, or a container's filter, has no openat2."""
    start = _AT_FDCWD if at is None else at
    while (number := _libc.syscall(_OPENAT2, start, os.fsencode(path), _HOWS[flags], _HOW_SIZE)) < 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EPERM):
            return None
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), path)
    return int(number)


def _open_by_steps(path: str, flags: int, at: int | None) -> int:
    """Open component by component: a third of the speed of `_openat2`."""
    *above, last = [name for name in path.split("/") if name]
    here = os.dup(at) if at is not None else os.open("/", _STEP)
    try:
        for name in above:
            step = _step(name, _STEP, here)
            os.close(here)
            here = step
        return _step(last, flags | os.O_NOFOLLOW, here)
    finally:
        os.close(here)


def _step(name: str, flags: int, at: int) -> int:
    try:
        return os.open(name, flags, dir_fd=at)
    except NotADirectoryError:  # of a link too, where a directory is asked for
        if stat.S_ISLNK(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
        raise


def open_directory(path: str, at: int | None = None) -> int:
    """Return the handle of a directory below another's handle, or at an absolute path. Raises OSError, DamagedError."""
    return _open(path, _DIRECTORY, at)


@contextmanager
def directory(path: str, at: int | None = None, *, make: bool = False) -> Iterator[int]:
    """Yield a directory's handle; `make` it below a handle where it is not there. Raises OSError, DamagedError."""
    try:
        handle = open_directory(path, at)
    except FileNotFoundError:
        if not make or at is None:
            raise
        handle = _made(path, at)
    try:
        yield handle
    finally:
        os.close(handle)


def _made(path: str, at: int) -> int:
    above, _, name = path.rpartition("/")
    with directory(above or ".", at, make=bool(above)) as parent:
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
        return open_directory(name, parent)


def read(path: str, limit: int, at: int | None = None) -> tuple[bytes, os.stat_result]:
    """Return a regular file's bytes and status. Raises FileNotFoundError; DamagedError for anything else, and above `limit`."""
    with regular_file(path, at) as (handle, status):
        if status.st_size > limit:
            raise DamagedError(f"{path} has {status.st_size:,} bytes; a file of its kind has {limit:,} at most")
        data = os.read(handle, status.st_size)
        while len(data) < status.st_size and (more := os.read(handle, status.st_size - len(data))):
            data += more  # a signal, or more than 2 GiB
        return data, status


@contextmanager
def regular_file(path: str, at: int | None = None) -> Iterator[tuple[int, os.stat_result]]:
    """Yield a regular file's handle and status. Raises FileNotFoundError; DamagedError for anything that is none."""
    try:
        handle = _open(path, _READ, at)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without its driver
            raise DamagedError(f"{path} is not a regular file") from None
        if error.errno == errno.ENOTDIR:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is not a regular file")
        yield handle, status
    finally:
        os.close(handle)


def exists(path: str) -> bool:
    """Tell whether there is anything at an absolute path, a link that leads nowhere too."""
    try:
        os.close(_open(path, _LOOK))
    except (FileNotFoundError, NotADirectoryError, DamagedError):
        return False
    return True


def name_new(source: str, target: str, at: int, source_at: int | None = None) -> bool:
    """Give a file the name `target` in the directory `at` unless that exists; tell whether it was given."""
    try:
        os.link(source, target, src_dir_fd=source_at, dst_dir_fd=at, follow_symlinks=False)
        return True
    except FileExistsError:
        # A retried link() over NFS may report EEXIST although the first try made it: then both names are one inode.
        made = os.stat(target, dir_fd=at, follow_symlinks=False)
        return os.path.samestat(os.stat(source, dir_fd=source_at, follow_symlinks=False), made)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    start = _AT_FDCWD if source_at is None else source_at
    if _libc.renameat2(start, os.fsencode(source), at, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in _NO_RENAME:
        raise OSError(errno.EOPNOTSUPP, NEITHER, target)
    raise OSError(code, os.strerror(code), target)
