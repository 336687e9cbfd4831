"""What a run's workers say of questions that do not get on: tried again, or refused, each in a file of its own in the run.

The queue knows of retries too, but it may be gone, and a report is made from files alone. What is said here is for people: a
note that is old, damaged or another run's counts as none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from storage.errors import DamagedError
from storage.runs.run import Run
from storage.screen.terminal import one_line

REMEMBERED = 180.0  # seconds: longer than any pause before an attempt
_DIRECTORY = ".run/retries"
_MAX_NOTE = 1 << 18  # bytes
_MAX_QUESTIONS = 4096  # in one note: a worker has fewer threads
_MAX_NOTES = 100
_Number = Annotated[int, Field(ge=0, le=1 << 31)]


class _Note(BaseModel):
    run_id: str
    at: Annotated[float, Field(allow_inf_nan=False)]
    why: Annotated[str, Field(max_length=4096)]
    questions: list[tuple[_Number, _Number]]  # part and sequence


def note_retries(run: Run, worker: str, questions: Collection[tuple[int, int]], why: str) -> None:
    """Note which questions a worker tries again, and why the last one; with none of them, take its note back."""
    key = f"{_DIRECTORY}/{worker.replace('/', '_')}.json"
    if not questions:
        run.store.delete(key)
        return
    some = list(questions)[:_MAX_QUESTIONS]
    note = _Note(run_id=run.run_id, at=time.time(), why=why, questions=some)
    run.store.put(key, json.dumps(note.model_dump()).encode())


def forget_retries(run: Run) -> None:
    """Remove every worker's note: the run is finished."""
    run.store.delete_directory(_DIRECTORY)


def tried_again(run: Run) -> str:
    """Say how many questions wait for another attempt, and why the last one failed: `2 tried again (3 of 6): engine_error: …`.

    Nothing where none waits. A question that is finished since is left out. Raises OSError, DamagedError.
    """
    notes = [note for name in run.store.list(_DIRECTORY)[:_MAX_NOTES] if (note := _read(run, name)) is not None]
    noted: dict[int, set[int]] = {}
    for part, sequence in (question for note in notes for question in note.questions):
        noted.setdefault(part, set()).add(sequence)
    number = sum(_unfinished(run, part, sequences) for part, sequences in noted.items())
    return one_line(f"{number:,} tried again {max(notes, key=lambda note: note.at).why}") if number else ""


def stalls(run: Run) -> list[str]:
    """Return a sentence on each thing that keeps a run's questions from getting on, as far as its files say."""
    found: list[str] = []
    with suppress(OSError, DamagedError):  # no question of the account depends on it
        found += filter(None, [tried_again(run)])
    with suppress(OSError, DamagedError):
        found += [one_line(f"refused by {worker}: {why}") for worker, why in run.refusals().items()]
    return found


def _unfinished(run: Run, part: int, sequences: set[int]) -> int:
    if part in run.parts_with_sidecar():
        return 0
    try:
        return len(sequences - run.staged(part).keys())
    except KeyError:  # no part of the plan
        return 0


def _read(run: Run, name: str) -> _Note | None:
    """Return a worker's note, if it is of this run and says something of now."""
    try:
        note = _Note.model_validate_json(run.store.get(f"{_DIRECTORY}/{name}", _MAX_NOTE))
    except (FileNotFoundError, ValidationError, DamagedError):  # taken back at this moment, or a stranger's
        return None
    return note if note.run_id == run.run_id and abs(time.time() - note.at) < REMEMBERED else None
