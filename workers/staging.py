"""Writing into a run directory that may be full or unwritable for a while: the worker waits, and no question fails of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from celery.worker import state

from storage.space import describe
from workers.errors import WorkerEndsError

logger = logging.getLogger(__name__)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0  # seconds
_LINE_INTERVAL = 60.0  # between two lines in the log, however many threads wait
T = TypeVar("T")

_lock = threading.Lock()
_last_line = float("-inf")


def keep(write: Callable[[], T], location: str) -> T:
    """Return what `write` returns, calling it again while the disk refuses. Raises WorkerEndsError on the way out.

    The task's thread waits, so that a worker whose results go nowhere takes no further questions: the run slows down. A
    wait above the visibility timeout gives the question to another thread or worker too, which then waits likewise.
    """
    wait = _FIRST_WAIT
    waited = False
    while True:
        try:
            result = write()
        except OSError as error:
            _say(f"cannot write: {describe(error, location)}. Questions wait for it; none fails.")
            waited = True
        else:
            if waited:
                _say(f"{location} can be written again", always=True)
            return result
        ends = time.monotonic() + wait
        while time.monotonic() < ends:
            if state.should_stop is not None and state.should_stop is not False:  # the exit code, 0 too
                raise WorkerEndsError(f"the worker ended while {location} could not be written")
            time.sleep(min(0.5, wait))
        wait = min(2 * wait, _LONGEST_WAIT)


def _say(line: str, *, always: bool = False) -> None:
    global _last_line  # noqa: PLW0603  (one log per process)
    with _lock:
        now = time.monotonic()
        if always:
            if _last_line == float("-inf"):
                return  # another thread has said it
            _last_line = float("-inf")
        elif now - _last_line < _LINE_INTERVAL:
            return
        else:
            _last_line = now
    (logger.info if always else logger.error)(line)
