"""Health: whether the processes on this machine live and work, for a container's health check."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from storage.screen.terminal import duration
from workers.monitor.presence import Presence
from workers.settings import WorkerSettings

_BEAT = 60.0  # seconds; twelve times what lies between two notes
_MARGIN = 60.0  # beyond the watchdog's own bound
_IMAGE = 300.0  # decoding is ended after 60 s of CPU: this is a file system that does not answer, or no CPU to be had
_SWEEP = 900.0  # a sweep packs a part for as long as it takes: 1,000 questions of the 7B model take 3 s


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    healthy: bool
    text: str


def check_of_broker(trouble: str | None) -> Check:
    """Judge the broker by what is wrong with it, None where it answers."""
    return Check("broker", trouble is None, trouble or "answers")


def checks_of_processes(here: Sequence[Presence], config: WorkerSettings) -> list[Check]:
    """Judge the processes found here."""
    now = time.time()
    found = []
    if not here:
        found.append(Check("process", False, "no worker or collector of this user runs on this machine"))
    for presence in here:
        found += _of_process(presence, now, config)
    return found


def _of_process(presence: Presence, now: float, config: WorkerSettings) -> list[Check]:
    age = now - presence.seen
    found = [Check(f"{presence.name} process", age < _BEAT, f"pid {presence.pid}, last heard of {duration(age)} ago")]
    if presence.serves:
        found.append(_of_engine(presence, now, config))
        if presence.image_since is not None:
            age = now - presence.image_since
            found.append(Check(f"{presence.name} images", age < _IMAGE, f"busy with one image for {duration(age)}"))
    if presence.collects and presence.swept is not None:
        age = now - presence.swept
        limit = _SWEEP + config.sweep_interval
        found.append(Check(f"{presence.name} collector", age < limit, f"last sweep {duration(age)} ago"))
    return found


def _of_engine(presence: Presence, now: float, config: WorkerSettings) -> Check:
    name = f"{presence.name} engine"
    if presence.state == "loading":
        age = now - (presence.loading_since or presence.started)
        return Check(name, age < config.load_timeout + _MARGIN, f"loading {presence.model} for {duration(age)}")
    if presence.busy_since is not None:
        age = now - presence.busy_since
        return Check(name, age < config.engine_timeout + _MARGIN, f"busy with one batch for {duration(age)}")
    answered = "" if presence.answered is None else f", last answer {duration(now - presence.answered)} ago"
    return Check(name, True, f"ready on {presence.device}{answered}")
