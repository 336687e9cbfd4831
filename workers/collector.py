"""The collector: finds the runs under its data roots, packs complete slices, feeds the rest, summarises finished runs.

Any number of collectors may sweep the same runs at once. A sweep depends on files alone; a message that asks for one only
shortens the wait.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from storage.account import Bookkeeper
from storage.errors import DamagedError, UserError
from storage.failures import FAILURES_FILE, failures_csv, published_failures
from storage.pack import pack
from storage.run import Run, is_run
from workers.feed import feed

logger = logging.getLogger(__name__)
_SCAN_SHARE = 0.05  # of the time may go into looking for runs: large image folders lie beside them
_SCAN_DEPTH = 3
_PARTIAL_AGE = 600.0


class Collector:
    """Sweeps the runs below some directories."""

    def __init__(self, roots: tuple[Path, ...]) -> None:
        self._roots = roots
        self._runs: dict[Path, Run] = {}
        self._next_scan = float("-inf")

    def sweep(self) -> None:
        """Bring every unfinished run forward. An error in one run is logged and does not stop the others."""
        if time.monotonic() >= self._next_scan:
            self._scan()
        for path, run in list(self._runs.items()):
            try:
                if collect_run(run):
                    del self._runs[path]
            except Exception:  # a full disk, a broker that is away: this run waits for the next sweep
                logger.exception("cannot bring %s forward now", path)

    def _scan(self) -> None:
        begun = time.monotonic()
        found = {path for root in self._roots for path in find_runs(root)}
        self._runs = {path: run for path, run in self._runs.items() if path in found}
        for path in found - self._runs.keys():
            try:
                run = Run.open(path)
                if not run.is_finished():
                    self._runs[path] = run
            except UserError as error:
                logger.warning("%s", error)
        ended = time.monotonic()
        self._next_scan = ended + (ended - begun) / _SCAN_SHARE


def find_runs(root: Path, depth: int = _SCAN_DEPTH) -> list[Path]:
    """Return the run directories at or below a directory, a few levels deep."""
    if is_run(root):
        return [root]
    if depth == 0:
        return []
    try:
        with os.scandir(root) as entries:
            below = [Path(e.path) for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [run for path in below for run in find_runs(path, depth - 1)]


def collect_run(run: Run) -> bool:
    """Bring a run one sweep forward. Return whether every part is published."""
    run.refresh()
    published = run.parts_with_sidecar()
    staging = set(run.staging_directories())
    for piece in run.slices:
        label = run.label(piece.part)
        if label in staging or (piece.part not in published and run.part_path(piece.part).exists()):
            try:
                if pack(run, piece.part) and piece.part not in published:
                    logger.info("published %s", run.part_path(piece.part))
                    published.add(piece.part)
            except (DamagedError, UserError) as error:  # this slice waits; the others go on
                logger.warning("%s", error)
    run.store.delete_partials(_PARTIAL_AGE)
    finished = bool(run.slices) and all(piece.part in published for piece in run.slices) and _finish(run)
    feed(run, published)  # of a finished run too: it forgets that the last parts were fed, which a repair feeds again
    return finished


def _finish(run: Run) -> bool:
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
