"""What the page of a run shows: gathered when somebody looks, and so seldom that a page left open costs little."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path

from producer.show.listeners import Listeners, listening_workers
from producer.show.live import Pace, done, going
from storage.errors import DamagedError, UserError
from storage.hdf5.layout import open_part
from storage.runs.account import Account, Bookkeeper
from storage.runs.failures import Failed, published_failures, staged_failures
from storage.runs.run import Run
from storage.stores.location import is_url, join
from storage.stores.object_file import File, ObjectFile
from storage.stores.space import reason
from storage.views.report_data import Shown, samples

_FRESH = 4.0  # seconds that what was gathered is shown; longer where it took long:
_SHARE, _STALE = 20, 60.0  # so many times what it took, and so many seconds at most
_ASKED = 10.0  # between two looks at the queue
_PARTS, _QUESTIONS = 4, 3  # the newest parts, and questions of each, that are shown
_PATIENCE = 1.0  # seconds that are spent on further parts at one look: an image may take as long
_OF_A_REASON, _FAILURES = 3, 20  # failures that are shown


@dataclass(frozen=True, slots=True)
class Look:
    """A run at one moment."""

    at: str
    account: Account
    cancelled: bool
    going: list[str]  # its rate and the like
    listeners: Listeners
    problems: list[str]
    failures: list[Failed]
    samples: list[Shown]
    trouble: str = ""  # why nothing newer is known

    @property
    def share(self) -> int:
        """Return how many per cent are finished; 100 of all alone."""
        return 100 * done(self.account) // max(1, self.account.planned)

    @property
    def samples_digest(self) -> str:
        """Return what stands for the samples: a page that has them is not sent them again."""
        return hashlib.sha256(repr(self.samples).encode(errors="surrogatepass")).hexdigest()[:16]


class Board:
    """Looks at a run for those who ask, one after another; others are told meanwhile what was seen last."""

    def __init__(self, run: Run) -> None:
        self._run, self._books, self._pace = run, Bookkeeper(run), Pace()
        self._listeners, self._asked = Listeners([], []), float("-inf")
        self._failures: tuple[Account, list[Failed]] = Account(), []  # published ones, with when they were read
        self._samples: dict[int, list[Shown]] = {}  # by part
        self._lock = threading.Lock()
        self._last = self._gather()
        self._due = time.monotonic() + _FRESH

    def look(self) -> Look:
        """Return the run as it was a few seconds ago at most, or as it was last seen where it cannot be looked at."""
        if self._lock.acquire(blocking=False):
            try:
                if time.monotonic() >= self._due:
                    self._look_again()
            finally:
                self._lock.release()
        return self._last

    def close(self, patience: float) -> None:
        """Look no more; wait for a look that goes on, so many seconds at most."""
        self._lock.acquire(timeout=patience)

    def _look_again(self) -> None:
        began = time.monotonic()
        try:
            self._last = self._gather()
        except (UserError, DamagedError) as error:
            self._last = replace(self._last, trouble=str(error))
        except OSError as error:
            self._last = replace(self._last, trouble=reason(error))
        now = time.monotonic()
        self._due = now + min(_STALE, max(_FRESH, _SHARE * (now - began)))

    def _gather(self) -> Look:
        run, now = self._run, time.monotonic()
        account, at = self._books.account(), datetime.now(UTC).isoformat(timespec="seconds")
        self._pace.note(account, now)
        cancelled = run.is_cancelled()
        over = account.finished or cancelled
        if over:
            self._listeners, self._asked = Listeners([], []), float("-inf")
        elif now - self._asked > _ASKED:
            self._listeners, self._asked = listening_workers(run), now
        refused = [f"refused by {worker}: {why}" for worker, why in run.refusals().items()]
        return Look(
            at=at,
            account=account,
            cancelled=cancelled,
            going=[] if over else going(run, account, self._pace, now),
            listeners=self._listeners,
            problems=[*self._listeners.problems, *refused, *self._books.lost_parts()],
            failures=self._some_failures(account),
            samples=self._some_samples(),
        )

    def _some_failures(self, account: Account) -> list[Failed]:
        """Return failures of every reason, those of open parts first."""
        seen, failures = self._failures
        if (seen.parts_published, seen.reasons) != (account.parts_published, account.reasons):
            most = sum(min(number, _OF_A_REASON) for number in account.reasons.values())
            failures = list(islice(_of_each_reason(published_failures(self._run)), min(most, _FAILURES)))
            self._failures = account, failures
        open_ones = islice(staged_failures(self._run), _FAILURES)
        return list(islice(_of_each_reason(chain(open_ones, failures)), _FAILURES))

    def _some_samples(self) -> list[Shown]:
        """Return questions of the newest parts. Each part is looked into once, some at the next look where images are slow."""
        newest = sorted(self._run.parts_with_sidecar(), reverse=True)[:_PARTS]
        known, self._samples = self._samples, {}
        began = time.monotonic()
        for part in newest:
            if part in known:
                self._samples[part] = known[part]
            elif time.monotonic() - began < _PATIENCE:
                self._samples[part] = list(self._samples_of(part))
        return [shown for part in newest for shown in self._samples.get(part, ())]

    def _samples_of(self, part: int) -> Iterator[Shown]:
        location = join(self._run.location, self._run.part_name(part))
        file: File = ObjectFile(location) if is_url(location) else Path(location)
        # ValueError and TypeError: a stranger's file, whose attributes have our names and other values.
        with suppress(OSError, UserError, DamagedError, ValueError, TypeError), open_part(file) as opened:
            yield from samples(self._run, opened, _QUESTIONS)


def _of_each_reason(failures: Iterable[Failed]) -> Iterator[Failed]:
    found: Counter[str] = Counter()
    for failed in failures:
        found[failed.failure.reason] += 1
        if found[failed.failure.reason] <= _OF_A_REASON:
            yield failed
