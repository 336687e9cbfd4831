"""What keeps files from being written to a directory: a full disk, a quota, a read-only file system. Writes nothing itself."""

from __future__ import annotations

import errno
import os

from storage.stores.handles import NEITHER
from storage.stores.location import is_url

_LITTLE = 64 << 20  # bytes; a part of 1,000 questions of the 7B model has 64 MB
_REASONS = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "the quota there is used up",
    errno.EROFS: "its file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ESTALE: "the network file system has lost it",
    errno.ENOENT: "it is gone",
    errno.EOPNOTSUPP: NEITHER,
}


def describe(error: OSError, location: str) -> str:
    """Return an error of writing to a location as a sentence: what is wrong there, and how much is free."""
    code = error.errno or next((c for c in (errno.ENOSPC, errno.EDQUOT) if f"errno = {c}" in str(error)), None)  # HDF5's
    what = _REASONS.get(code or 0, str(error))
    try:
        free = os.statvfs(location)  # an object store is no such place
    except OSError:
        return f"{location}: {what}"
    return f"{location}: {what} ({free.f_bavail * free.f_frsize >> 20:,} MB free)"


def reason(error: OSError) -> str:
    """Return an error of a file system as a sentence, of which it is not known where it came up."""
    place = error.filename2 or error.filename
    where = "cannot write" if place is None else os.fsdecode(place) if isinstance(place, (str, bytes)) else str(place)
    return f"{where}: {_REASONS.get(error.errno or 0, error.strerror or str(error))}"


def obstacle(location: str) -> str | None:
    """Return what would keep this user from writing to a location; None where nothing is seen: a quota, an object store."""
    if is_url(location):
        return None
    try:
        free = os.statvfs(location)
    except OSError as error:
        return describe(error, location)
    if free.f_flag & os.ST_RDONLY:
        return describe(OSError(errno.EROFS, ""), location)
    available = free.f_bavail * free.f_frsize
    if available < _LITTLE or (free.f_files and not free.f_favail):
        what = f"only {available >> 20:,} MB are free" if free.f_favail or not free.f_files else "no more files fit"
        return f"{location}: its disk is full or nearly so: {what}"
    if not os.access(location, os.W_OK):
        return describe(OSError(errno.EACCES, ""), location)
    return None
