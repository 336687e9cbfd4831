"""Which questions wait for another attempt here, told in a file of their run: for whoever has no queue to ask.

The file is written a moment after a failed attempt, by a thread of its own: no question waits for it, and many that fail at
once make one file.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from storage.errors import DamagedError, ReplacedError
from storage.runs.run import Run
from storage.runs.stalls import REMEMBERED, note_retries

_DELAY = 2.0  # seconds
_lock = threading.Lock()


@dataclass(slots=True)
class _Waiting:
    run: Run
    worker: str
    why: str = ""
    questions: dict[tuple[int, int], float] = field(default_factory=dict)  # part and sequence to when it last failed
    due: bool = False  # the file is about to be written


_runs: dict[str, _Waiting] = {}


def failed(run: Run, part: int, sequence: int, worker: str, why: str) -> None:
    """Note that an attempt at a question failed and another one follows."""
    with _lock:
        waiting = _runs.setdefault(run.run_id, _Waiting(run, worker))
        waiting.run, waiting.why = run, why
        waiting.questions[part, sequence] = time.monotonic()
        _write_soon(waiting)


def ended(run: Run, part: int, sequence: int) -> None:
    """Note that a question has ended, whether or not it had failed before."""
    if run.run_id not in _runs:  # as nearly always: without the lock
        return
    with _lock:
        waiting = _runs.get(run.run_id)
        if waiting is not None and waiting.questions.pop((part, sequence), None) is not None:
            _write_soon(waiting)


def _write_soon(waiting: _Waiting) -> None:
    if not waiting.due:
        waiting.due = True
        timer = threading.Timer(_DELAY, _write, (waiting.run.run_id,))
        timer.daemon = True
        timer.start()


def _write(run_id: str) -> None:
    with _lock:
        waiting = _runs[run_id]
        waiting.due = False
        oldest = time.monotonic() - REMEMBERED  # others may have taken them over
        waiting.questions = {question: then for question, then in waiting.questions.items() if then > oldest}
        questions = list(waiting.questions)
        if not questions:
            del _runs[run_id]
    with suppress(OSError, DamagedError, ReplacedError):  # it is for people alone: the run's files say what is finished
        note_retries(waiting.run, waiting.worker, questions, waiting.why)
