"""Resuming a cancelled run: a command takes back the cancellation that it found when it was given, and no later one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from storage.runs.cancellation import Cancellation
from storage.runs.run import Run, is_run
from storage.stores.location import resolve_location

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Resumption:
    """What a command that begins or resumes a run may take back."""

    found: Cancellation | None

    @classmethod
    def of(cls, output_dir: str | Path) -> Resumption:
        """Look for a cancellation before anything else is done: to check a table and its images takes minutes.

        One that was written while this process started is later than the command.
        """
        location = resolve_location(output_dir)
        found = Run.open(location).cancellation() if is_run(location) else None
        if found is not None and found.at is not None and _begun() < found.at <= time.time():
            found = None
        return cls(found)

    def take_back(self, run: Run) -> bool:
        """Let the run go on; return False where it has been cancelled since the command was given."""
        if self.found is not None:
            run.withdraw_cancellation(self.found)
        return not run.is_cancelled()


def _begun() -> float:
    """Return when this process began, on the wall clock; by the kernel, since importing takes a second."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / _CLOCK_TICKS)
    except (OSError, ValueError, IndexError, AttributeError):  # another system than Linux
        return time.time()
