"""Attempts: why questions of a run were lately tried again here, for whoever watches a run that seems to stand still."""

from __future__ import annotations

import threading
import time

from storage.runs.stalls import REMEMBERED
from storage.screen.terminal import one_line

_RUNS = 64  # remembered at a time
_LONGEST = 200  # characters of a reason

_lock = threading.Lock()
_last: dict[str, tuple[float, str]] = {}


def note(run_id: str, attempt: int, of: int, reason: str) -> str:
    """Note that an attempt failed and another one follows; return that as it is shown."""
    text = one_line(f"({attempt} of {of}): {reason}")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    with _lock:
        _last.pop(run_id, None)
        _last[run_id] = time.monotonic(), text
        if len(_last) > _RUNS:
            del _last[next(iter(_last))]
    return text


def reasons() -> dict[str, str]:
    """Return the latest reason of each run, as `(3 of 6): engine_error: …`; old ones are forgotten."""
    with _lock:
        for run_id, (then, _) in list(_last.items()):
            if time.monotonic() - then > REMEMBERED:
                del _last[run_id]
        return {run_id: text for run_id, (_, text) in _last.items()}
