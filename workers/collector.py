"""The collector: finds the runs under its data roots, packs complete slices, feeds the rest, summarises finished runs.

Any number of collectors may sweep the same runs at once. A sweep depends on files alone; a message that asks for one only
shortens the wait.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from storage.account import Bookkeeper
from storage.errors import DamagedError, ReplacedError, UserError
from storage.failures import FAILURES_FILE, failures_csv, published_failures
from storage.location import is_within
from storage.pack import pack
from storage.run import Run, find_runs, part_names
from storage.space import describe
from workers.broker import trouble
from workers.feed import feed, queue_lengths
from workers.metrics import after_sweep
from workers.parent import PARENT_VARIABLE
from workers.settings import settings

logger = logging.getLogger(__name__)
_SCAN_SHARE = 0.05  # of the time may go into looking for runs: large image folders lie beside them
_SCAN_DEPTH = 3
_REPORT = (
    "import sys; from workers.parent import die_with_named_parent; die_with_named_parent(); "
    "from storage.report import write_report; from storage.run import Run; "
    "write_report(Run.open(sys.argv[1]))"
)
_REPORT_SECONDS = 120
_REPEAT = 300.0  # seconds between two equal lines in the log


class Collector:
    """Sweeps the runs below some directories."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        self._roots = roots
        self._runs: dict[str, Run] = {}
        self._books: dict[str, Bookkeeper] = {}  # of the same runs, for the metrics
        self._next_scan = float("-inf")
        self._complaints: dict[str, tuple[str, float]] = {}
        self.swept = time.time()  # when it last ended with a run, on the wall clock

    def sweep(self) -> None:
        """Bring every unfinished run forward. An error in one run is logged and does not stop the others."""
        begun = time.monotonic()
        if begun >= self._next_scan:
            self._scan()
        for location, run in list(self._runs.items()):
            try:
                if collect_run(run):
                    del self._runs[location]
            except ReplacedError as error:  # the next scan finds what is there by now
                logger.warning("%s", error)
                del self._runs[location]
                self._next_scan = float("-inf")
            except OSError as error:  # the next sweep tries again
                self._complain(location, f"waits: cannot write {describe(error, location)}")
            except (OperationalError, RedisError) as error:
                self._complain(location, f"waits: the broker {trouble(error)}")
            except Exception:  # whatever it is, the other runs go on
                logger.exception("cannot bring %s forward now", location)
            else:
                self._complaints.pop(location, None)
            self.swept = time.time()
        self.swept = time.time()
        if settings().metrics_port:
            self._show_metrics(time.monotonic() - begun)

    def _show_metrics(self, seconds: float) -> None:
        self._books = {location: self._books.get(location, Bookkeeper(run)) for location, run in self._runs.items()}
        try:
            accounts = [(run, self._books[location].account()) for location, run in self._runs.items()]
            after_sweep(seconds, accounts, queue_lengths)
        except (OSError, DamagedError, OperationalError, RedisError) as error:
            logger.warning("metrics are not up to date: %s", error)

    def _complain(self, location: str, line: str) -> None:
        """Log why a run waits: once, and again when it changes or lasts."""
        said, when = self._complaints.get(location, ("", float("-inf")))
        if said != line or time.monotonic() - when > _REPEAT:
            logger.error("%s %s", location, line)
            self._complaints[location] = line, time.monotonic()

    def _scan(self) -> None:
        begun = time.monotonic()
        for root in self._roots:
            try:
                self._scan_root(root)
            except OSError as error:  # an object store that is away: its runs stay those that are known
                logger.warning("cannot look for runs now: %s", error)
        ended = time.monotonic()
        self._next_scan = ended + (ended - begun) / _SCAN_SHARE

    def _scan_root(self, root: str) -> None:
        found = set(find_runs(root, _SCAN_DEPTH))
        self._runs = {place: run for place, run in self._runs.items() if place in found or not is_within(place, root)}
        for location in found - self._runs.keys():
            try:
                run = Run.open(location)
                if not run.is_finished() or run.has_leftovers():
                    self._runs[location] = run
            except UserError as error:
                logger.warning("%s", error)


def collect_run(run: Run) -> bool:
    """Bring a run one sweep forward. Return whether every part is published."""
    run.refresh()
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
                logger.warning("%s", error)
    run.store.delete_partials(settings().visibility_timeout)
    finished = bool(run.slices) and all(piece.part in published for piece in run.slices) and _finish(run)
    # What lies under a part's name and could not be described waits for `--repair`: its questions could not be packed now.
    held = {piece.part for piece in run.slices if run.part_name(piece.part) in present}
    feed(
        run, published | held
    )  # of a finished run too: it forgets that the last parts were fed, which a repair feeds again
    return finished


def _finish(run: Run) -> bool:
    if not run.is_finished():
        _write_report(run)  # before the account: a retry may be planned meanwhile
    account = Bookkeeper(run).account()
    if not account.finished:  # a retry has planned more at this moment
        return False
    if failures := published_failures(run):
        run.store.put(FAILURES_FILE, failures_csv(failures))
    else:
        run.store.delete(FAILURES_FILE)  # a retry has healed them all
    run.withdraw_cancellation()  # it came too late
    run.write_summary({**asdict(account), "finished_at": datetime.now(UTC).isoformat(timespec="seconds")})
    return True


def _write_report(run: Run) -> None:
    """Have the report written by a process of its own: a run's end needs it in no way, and a stranger's images are decoded."""
    try:
        subprocess.run(
            [sys.executable, "-P", "-c", _REPORT, run.location],
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_REPORT_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        logger.warning("%s: no report.html:\n%s", run.location, error.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("%s: no report.html: %s", run.location, error)
