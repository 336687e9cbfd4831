"""Troubles: what keeps runs from going on in this process. Each is said once, and the run is tried again with growing pauses.

A run that cannot be read or written fails alone: whoever works on runs asks here first, and goes on with the others.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
import time
from dataclasses import dataclass

from storage.stores.space import describe

logger = logging.getLogger(__name__)
_FREE = 2  # failures in a row that cost no pause: a network file system has its moments
_LONGEST = 30.0  # seconds
_REPEAT = 24 * 3600.0  # seconds between two equal lines in the log
_SHOWN, _LENGTH = 20, 500  # troubles that others are told of, and the characters of each
_NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM}


@dataclass(slots=True)
class _Trouble:
    sentence: str
    said: float
    failures: int = 0  # in a row
    until: float = 0.0  # the run is not tried before


class Troubles:
    """The troubles of a process, by the location of the run. Thread-safe."""

    def __init__(self) -> None:
        self._by_location: dict[str, _Trouble] = {}
        self._lock = threading.Lock()

    def note(self, location: str, sentence: str, *, pause: bool = True) -> None:
        """Note why a run does not go on; log it if that is news. `pause`: do not try it again at once."""
        now = time.monotonic()
        with self._lock:
            trouble = self._by_location.get(location)
            news = trouble is None or _kind(trouble.sentence) != _kind(sentence) or now - trouble.said > _REPEAT
            if trouble is None:
                trouble = self._by_location[location] = _Trouble(sentence, now)
            if news:
                trouble.said = now
            trouble.sentence = sentence
            if pause and now >= trouble.until:  # many threads may fail at once
                trouble.failures += 1
                trouble.until = now + _pause(trouble.failures)
        if news:
            logger.error("%s %s", location, sentence)

    def clear(self, location: str) -> bool:
        """Note that a run goes on; tell whether it did not before."""
        if location not in self._by_location:
            return False
        with self._lock:
            return self._by_location.pop(location, None) is not None

    def may_try(self, location: str) -> bool:
        """Tell whether a run may be tried now; of one with a trouble that is so once in each pause."""
        if (trouble := self._by_location.get(location)) is None:
            return True
        now = time.monotonic()
        with self._lock:
            if now < trouble.until:
                return False
            trouble.until = now + _pause(trouble.failures)
            return True

    def sentences(self) -> dict[str, str]:
        """Return the first troubles: location to sentence."""
        with self._lock:
            return {place: trouble.sentence[:_LENGTH] for place, trouble in list(self._by_location.items())[:_SHOWN]}


troubles = Troubles()


def sentence(error: OSError, location: str) -> str:
    """Return an error of reading or writing a run as a sentence."""
    if error.errno in _NOT_ALLOWED:
        place, _, name = str(error.filename or location).rpartition("/")
        return f"waits: this user may not read or write {place if name.endswith('.partial') else f'{place}/{name}'}"
    if error.errno in _NOT_WRITTEN or error.errno is None:  # of HDF5, or of an object store
        return f"waits: cannot write {describe(error, location)}"
    return f"waits: {error}"


def _pause(failures: int) -> float:
    return 0.0 if failures <= _FREE else float(min(_LONGEST, 2 ** (failures - _FREE - 1)))


def _kind(text: str) -> str:
    """Return a sentence without its numbers: how much is free changes with each look."""
    return re.sub(r"\d+", "", text)
