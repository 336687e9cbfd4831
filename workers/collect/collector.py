"""The collector: finds the runs under its data roots, packs complete slices, feeds the rest, summarises finished runs.

Any number of collectors may sweep the same runs at once. A sweep depends on files alone; a message that asks for one only
shortens the wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from storage.errors import DamagedError, UserError
from storage.runs.account import Bookkeeper
from storage.runs.failures import FAILURES_FILE, failures_csv, published_failures
from storage.runs.pack import pack
from storage.runs.run import Run, part_names
from storage.runs.stalls import forget_retries
from workers.collect.scanner import Scanner
from workers.monitor.run_metrics import MOST_RUNS, after_sweep
from workers.monitor.troubles import sentence, troubles
from workers.queue.broker import trouble
from workers.queue.feed import broker_memory, feed, queue_lengths
from workers.queue.home import CopyError
from workers.settings import settings

logger = logging.getLogger(__name__)
_SCAN_SHARE = 0.05  # of the time may go into looking for runs: large image folders lie beside them


class Collector:
    """Sweeps the runs below some directories. `ended` is told the location of each run that ends."""

    def __init__(self, roots: tuple[str, ...], ended: Callable[[str], None] = lambda _: None) -> None:
        self._scanner = Scanner(roots)
        self._ended = ended
        self._books: dict[str, Bookkeeper] = {}  # of the same runs, for the metrics
        # A run's: a hint's task and a sweep would pack the same part at once, at twice the memory and for nothing.
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._next_scan = float("-inf")
        self.swept = time.time()  # when it last ended with a run, on the wall clock

    def sweep(self) -> None:
        """Bring every unfinished run forward. An error in one run is said, and does not stop the others."""
        begun = time.monotonic()
        if begun >= self._next_scan:
            self._scan()
        for run in self._scanner.unfinished():
            if troubles.may_try(run.location):
                self.bring_forward(run)
            self.swept = time.time()
        self.swept = time.time()
        if settings().metrics_port:
            self._show_metrics(time.monotonic() - begun)

    def bring_forward(self, run: Run) -> bool:
        """Bring one run forward, whatever is wrong with it; return whether it is finished."""
        location = run.location
        try:
            with self._turns[location]:
                finished = collect_run(run, self._ended)
        except OSError as error:
            troubles.note(location, sentence(error, location))
        except (OperationalError, RedisError) as error:
            troubles.note(location, f"waits: the broker {trouble(error)}", pause=False)
        except (DamagedError, UserError) as error:  # the rest of the run goes on
            troubles.note(location, f"waits: {error}", pause=False)
        except Exception as error:  # whatever a run's files make it, the other runs go on
            troubles.note(location, f"waits: {type(error).__name__}: {error}")
            logger.debug("%s", location, exc_info=True)
        else:
            troubles.clear(location)
            if finished:
                self._turns.pop(location, None)
                self._scanner.ended(location)
            return finished
        return False

    def _scan(self) -> None:
        begun = time.monotonic()
        self._scanner.scan()
        for location in self._scanner.unreported:
            self._ended(location)
        self._scanner.unreported.clear()
        ended = time.monotonic()
        self._next_scan = ended + (ended - begun) / _SCAN_SHARE

    def _show_metrics(self, seconds: float) -> None:
        runs = self._scanner.runs
        shown = dict(list(runs.items())[:MOST_RUNS])
        self._books = {location: self._books.get(location, Bookkeeper(run)) for location, run in shown.items()}
        accounts = []
        for location, run in shown.items():
            try:
                accounts.append((run, self._books[location].account()))
            except Exception as error:  # noqa: BLE001  (its sweep says what is wrong)
                logger.debug("no metrics of %s: %s", location, error)
        after_sweep(seconds, len(runs), accounts, troubles.sentences(), queue_lengths, broker_memory)


def collect_run(run: Run, ended: Callable[[str], None] = lambda _: None) -> bool:
    """Bring a run one sweep forward. Return whether every part is published; `ended` is told when that is new.

    Raises what is wrong with one of its slices after the others are brought forward.
    """
    run.refresh()
    damaged: list[str] = []
    published = run.parts_with_sidecar()
    staging, present = set(run.staging_directories()), set(part_names(run.location))
    for piece in run.slices:
        name = run.part_name(piece.part)
        if run.label(piece.part) in staging or (piece.part not in published and name in present):
            try:
                if pack(run, piece.part) and piece.part not in published:
                    logger.info("published %s", run.store.address(name))
                    published.add(piece.part)
            except (DamagedError, UserError) as error:  # this slice waits; the others go on
                damaged.append(str(error))
    run.store.delete_partials(settings().visibility_timeout)
    finished = bool(run.slices) and all(piece.part in published for piece in run.slices) and _finish(run, ended)
    # What lies under a part's name and could not be described waits for `--repair`: its questions could not be packed now.
    held = {piece.part for piece in run.slices if run.part_name(piece.part) in present}
    try:
        # Of a finished run too: it forgets that the last parts were fed, which a repair feeds again.
        feed(run, published | held)
    except CopyError:
        if not finished:
            raise
    if damaged:
        raise DamagedError("; ".join(damaged))
    return finished


def _finish(run: Run, ended: Callable[[str], None]) -> bool:
    was_finished = run.is_finished()
    books = Bookkeeper(run)
    account = books.account()
    if not account.finished:  # a retry has planned more at this moment
        return False
    if account.failed:
        run.store.put(FAILURES_FILE, failures_csv(published_failures(run)))
    else:
        run.store.delete(FAILURES_FILE)  # a retry has healed them all
    for lost in books.lost_parts():
        logger.error("%s: %s: `producer enqueue … --repair` computes it again", run.location, lost)
    run.withdraw_cancellation()  # it came too late
    if not was_finished:
        forget_retries(run)
    run.write_summary({**asdict(account), "finished_at": datetime.now(UTC).isoformat(timespec="seconds")})
    if not was_finished:
        ended(run.location)
    return True
