"""Memory of a process that handles many small objects: what its garbage collector and its allocator are told meanwhile."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGE, _KEPT = 4 << 20, 16 << 20
_paused: list[bool] = []  # whether it was enabled, for each block that is entered, of all threads
_lock = threading.Lock()


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the garbage collector, where objects arise by the ten thousand: it would go through them again and again."""
    with _lock:
        _paused.append(gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            # The first of them found it as it was before, the others off: whichever ends last restores it.
            if _paused.pop() and not _paused:
                gc.enable()


@lru_cache(maxsize=1)
def keep_heap() -> None:
    """Have the process keep up to 16 MB of freed memory, for good. Only glibc knows how; elsewhere nothing happens.

    HDF5 allocates and frees a buffer of 1 MB whenever it writes a text, and glibc would give it back to the kernel each time:
    ten system calls a question, and 85 us of CPU time (177 to 95 for its four texts).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
