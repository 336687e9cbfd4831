"""Trouble: what it is when HDF5 fails. The file, something in it that no part has, or the disk or network that it lies on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from storage.errors import ADVICE, DamagedError, LayoutError, NotReadError, UserError
from storage.stores.object_file import File

_ERRNO = re.compile(r"errno = (\d+)")


@contextmanager
def named(file: File, what: str = "HDF5 cannot read it") -> Iterator[None]:
    """Say which file it is that HDF5 cannot read, and what is to blame: its own errors do not.

    Raises UserError where there is no such file, LayoutError, NotReadError, DamagedError.
    """
    try:
        yield
    except (UserError, DamagedError):  # named already
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{file}: no such file") from error
    except (OSError, KeyError, RuntimeError) as error:
        if (number := errno_of(error)) is not None:
            raise NotReadError(number, f"{file} cannot be read now: {os.strerror(number)}") from error
        raise DamagedError(f"{file}: {what} ({error}); {ADVICE}") from error
    except (ValueError, TypeError, OverflowError) as error:  # h5py of a type or a space that NumPy does not have
        raise LayoutError(file, "it", f"h5py cannot read it ({error})") from error


def errno_of(error: BaseException) -> int | None:
    """Return the operating system's number of an error, which HDF5 may have put into words; None where it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _ERRNO.search(str(error))
    return int(found[1]) if found else None
