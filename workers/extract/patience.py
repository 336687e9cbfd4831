"""Writing into a run directory that may be full or unwritable for a while: no question fails of it, and other runs go on.

Some threads wait with what they have computed. Further questions of such a run are dropped, unbegun: feeding brings them back
when it can be written again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from celery.worker import state

from workers.errors import RunWaitsError, WorkerEndsError
from workers.monitor.troubles import sentence, troubles
from workers.queue.feed import look_again

logger = logging.getLogger(__name__)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0  # seconds
_SHARE, _SHARE_OF_ONE = 2, 8  # of its threads half may wait, an eighth for one run
T = TypeVar("T")

_lock = threading.Lock()
_waiting: Counter[str] = Counter()
_threads = 16


def set_threads(number: int) -> None:
    """Say how many threads this worker has."""
    global _threads  # noqa: PLW0603  (one pool per process)
    _threads = number


def retry_write(write: Callable[[], T], location: str, run_id: str) -> T:
    """Return what `write` returns, calling it again while the disk refuses.

    Raises WorkerEndsError on the way out, RunWaitsError where enough threads wait already. A wait above the visibility timeout
    gives the question to another thread or worker too, which then drops it.
    """
    try:
        result = write()
    except OSError as error:
        note_refusal(error, location)
        with _seat(location):
            result = _wait(write, location)
        goes_on(location, run_id)
    return result


def goes_on(location: str, run_id: str) -> None:
    """Say that a run can be read and written, if it could not; what was dropped meanwhile is fed again."""
    if troubles.clear(location):
        logger.info("%s can be written again", location)
        look_again(run_id)


def _wait(write: Callable[[], T], location: str) -> T:
    wait = _FIRST_WAIT
    while True:
        ends = time.monotonic() + wait
        while time.monotonic() < ends:
            if state.should_stop is not None and state.should_stop is not False:  # the exit code, 0 too
                raise WorkerEndsError(f"the worker ended while {location} could not be written")
            time.sleep(min(0.5, wait))
        try:
            return write()
        except OSError as error:
            note_refusal(error, location)
        wait = min(2 * wait, _LONGEST_WAIT)


def note_refusal(error: OSError, location: str) -> None:
    """Note that a run cannot be read or written now."""
    troubles.note(location, f"{sentence(error, location)}. Its questions wait; none fails.")


@contextmanager
def _seat(location: str) -> Iterator[None]:
    """Be one of the few threads that wait for a run. Raises RunWaitsError where there are enough."""
    with _lock:
        if _waiting[location] >= max(1, _threads // _SHARE_OF_ONE) or _waiting.total() >= _threads // _SHARE:
            raise RunWaitsError(f"{location} cannot be read or written now")
        _waiting[location] += 1
    try:
        yield
    finally:
        with _lock:
            _waiting[location] -= 1
