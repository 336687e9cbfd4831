"""The scan: which runs below some directories need a sweep. What cannot be looked at does not hide the rest.

Finished runs are remembered by what their directories looked like: each scan then asks for the times of a few files alone.
"""

from __future__ import annotations

import logging
import os
import time

from storage.errors import DamagedError, UserError
from storage.runs.run import Run, find_runs
from storage.stores.location import is_url, is_within
from workers.monitor.troubles import sentence, troubles

logger = logging.getLogger(__name__)
_DEPTH = 3
_SIGNED = (
    "run.json",
    "summary.json",
    "plan",
    "parts",
    "staging",
    "tmp",
)  # what changes where a finished run does not stay so
_REPORT = "report.html"  # storage.views.report's, without what it imports
_RECENT = 24 * 3600.0  # seconds

Identity = tuple[int, int, int]
Signature = tuple[Identity | None, ...]


class Scanner:
    """Knows the unfinished runs below some directories, as of its last scan."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        self._roots = roots
        self._unseen: set[str] = set()  # places that could not be looked at
        self._identities: dict[str, Identity | None] = {}  # of the runs
        self._finished: dict[str, Signature] = {}
        self.runs: dict[str, Run] = {}
        self.unreported: list[str] = []  # finished a short time ago, by a process that died before it wrote the report

    def scan(self) -> None:
        """Look for runs that are new here, begun again or gone."""
        unseen: set[str] = set()
        found: set[str] = set()
        for root in self._roots:
            found.update(find_runs(root, _DEPTH, lambda place, error: unseen.add(self._unseeable(place, error))))
        for gone in self.runs.keys() - found:
            if not any(is_within(gone, place) for place in unseen):
                self._forget(gone)
        for seen in self._unseen - unseen - self.runs.keys():
            troubles.clear(seen)
        self._unseen = unseen
        self._finished = {place: seen for place, seen in self._finished.items() if place in found}
        for location in sorted(found - self.runs.keys()):
            self._look_at(location)

    def unfinished(self) -> list[Run]:
        """Return the runs, each as the one that lies there now."""
        for location in list(self.runs):
            now = identity(location)
            if now != self._identities.get(location):
                self._forget(location)
                if now is not None:  # another run was begun in its place
                    self._look_at(location)
        return list(self.runs.values())

    def _unseeable(self, place: str, error: OSError) -> str:
        """Note that a place cannot be looked at; return it. What is known there is swept, which says what is wrong."""
        if place not in self.runs:
            troubles.note(place, sentence(error, place))
        return place

    def _forget(self, location: str) -> None:
        self.runs.pop(location, None)
        self._identities.pop(location, None)
        troubles.clear(location)

    def ended(self, location: str) -> None:
        """Take a finished run out, whose report is asked for."""
        self.runs.pop(location, None)
        self._identities.pop(location, None)
        self._finished.setdefault(location, ())

    def _look_at(self, location: str) -> None:
        seen = signature(location)
        if (seen is not None and self._finished.get(location) == seen) or not troubles.may_try(location):
            return
        try:
            here = identity(location)
            run = Run.open(location)
            needs_sweep = not run.is_finished() or run.has_leftovers()
        except OSError as error:
            troubles.note(location, sentence(error, location))
            return
        except (UserError, DamagedError) as error:
            troubles.note(location, f"waits: {error}")
            return
        except Exception as error:  # noqa: BLE001  (whatever a stranger has put there, the other runs go on)
            troubles.note(location, f"waits: {type(error).__name__}: {error}")
            return
        troubles.clear(location)
        if needs_sweep:
            self.runs[location], self._identities[location] = run, here
        elif seen is not None:
            if location not in self._finished and _lacks_report(location, seen):
                self.unreported.append(location)
            self._finished[location] = seen


def signature(location: str) -> Signature | None:
    """Return what changes when a finished run is taken up again; None in an object store, which has no such thing."""
    return None if is_url(location) else tuple(_state(f"{location}/.run/{name}") for name in _SIGNED)


def identity(location: str) -> Identity | None:
    """Return what tells a run from another one that was begun later in the same place; None in an object store."""
    return None if is_url(location) else _state(f"{location}/.run/run.json")


def _state(path: str) -> Identity | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _lacks_report(location: str, seen: Signature) -> bool:
    summary = seen[_SIGNED.index("summary.json")]
    recent = summary is not None and time.time() - summary[1] / 1e9 < _RECENT
    return recent and not os.path.lexists(f"{location}/{_REPORT}")
