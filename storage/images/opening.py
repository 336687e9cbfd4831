"""Opening a stranger's file: a regular one alone, never through a link, never waiting, never more of it than a bound."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

_SYS_OPENAT2 = 437  # the same number on every architecture that has come since 2019, and on x86 and ARM
_AT_FDCWD, _NO_MAGIC_LINKS, _NO_SYMLINKS = -100, 0x02, 0x04
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# No such call, or one that a container's filter does not know.
_NOT_HERE = {errno.ENOSYS, errno.EPERM}
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
_libc = ctypes.CDLL(None, use_errno=True)


class NotRegularError(OSError):
    """What a path names is a FIFO, a device or a socket: reading it may wait for ever, or never end."""


class LinkError(OSError):
    """A path that had no link in it has one now: what it names may be anywhere."""


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_regular(path: str) -> int:
    """Return a handle on the regular file at an absolute path without links, as `os.path.realpath` returns it.

    What was swapped for a link since that look opens nothing, so a path that lay inside a directory then is inside it now.
    Raises OSError, among them LinkError, NotRegularError and IsADirectoryError.
    """
    try:
        descriptor = _open_without_links(path)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise NotRegularError(errno.ENXIO, "a socket", path) from error
        if error.errno == errno.ELOOP:
            raise LinkError(errno.ELOOP, "a symbolic link is in the way", path) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise NotRegularError(errno.EINVAL, _KINDS.get(stat.S_IFMT(mode), "no regular file"), path)


def read_bounded(descriptor: int, limit: int) -> bytes:
    """Return what an open file holds. Raises OSError: EFBIG above `limit` bytes, whatever the file says or said of its size."""
    size = os.fstat(descriptor).st_size
    if size > limit:
        raise too_large(limit)
    found = [os.read(descriptor, size + 1)]  # one read for a file that is as long as it says
    total = len(found[0])
    while found[-1]:
        if total > limit:
            raise too_large(limit)
        found.append(os.read(descriptor, 1 << 20))
        total += len(found[-1])
    return b"".join(found)


def too_large(limit: int) -> OSError:
    """Return the error of a file that has more bytes than it may have."""
    return OSError(errno.EFBIG, f"more than {limit:,} bytes")


def _open_without_links(path: str) -> int:
    how = _How(_FLAGS, 0, _NO_SYMLINKS | _NO_MAGIC_LINKS)
    arguments = (_AT_FDCWD, ctypes.c_char_p(os.fsencode(path)), ctypes.byref(how), ctypes.sizeof(how))
    code = errno.EINTR
    while code == errno.EINTR:  # a signal came while a network's file system was asked
        descriptor: int = _libc.syscall(_SYS_OPENAT2, *arguments)
        if descriptor >= 0:
            return descriptor
        code = ctypes.get_errno()
    if code in _NOT_HERE:
        return _open_step_by_step(path)
    raise OSError(code, os.strerror(code), path)


def _open_step_by_step(path: str) -> int:
    """Do what `openat2` does on a kernel before 5.6: each directory by the handle of the one above it."""
    *directories, name = path.strip("/").split("/")
    parent = os.open("/", _STEP)
    try:
        for directory in directories:
            below = _follow_nothing(directory, _STEP, parent, path)
            os.close(parent)
            parent = below
        return _follow_nothing(name or ".", _FLAGS | os.O_NOFOLLOW, parent, path)
    finally:
        os.close(parent)


def _follow_nothing(name: str, flags: int, parent: int, path: str) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except NotADirectoryError:  # what O_PATH says of a link too, which may have gone again by now
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode) or stat.S_ISDIR(mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
        raise
