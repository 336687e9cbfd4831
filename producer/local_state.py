"""What this machine alone keeps of a run that `producer run` works on: its lock, its logs."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from storage.runs.run import Run
from storage.stores.location import is_url

LOCK = "lock"


def begun_here(run: Run) -> bool:
    """Tell whether `producer run` has worked on a run on this machine: with a server of its own, which is gone with it."""
    return (local_state(run) / LOCK).exists()


def is_worked_on(run: Run) -> bool:
    """Tell whether `producer run` works on a run now, or may: where the file system has no locks, nobody can say."""
    try:
        with (local_state(run) / LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # those who share a run share its lock
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def local_state(run: Run) -> Path:
    """Return the directory for what only this machine needs of a run."""
    if not is_url(run.location):
        return run.output_dir / ".run"
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "halp-extractor" / run.run_id
