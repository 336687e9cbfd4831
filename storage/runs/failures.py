"""The failures of a run by its latest state: of a question that was planned again its last part counts, and `written` wins."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from storage.errors import DamagedError
from storage.question import Question
from storage.runs.pack import sidecars
from storage.runs.run import Run
from storage.sample import Failure

FAILURES_FILE = "failures.csv"
_COLUMNS = ("question_id", "reason", "message", "attempts", "worker", "time", "image_id", "part")


@dataclass(frozen=True, slots=True)
class Failed:
    """A question that has failed, and where."""

    question: Question
    part: int
    failure: Failure
    published: bool  # in a part; else staged, until the rest of its slice is finished

    @property
    def image_id(self) -> str:
        """The question's image."""
        return self.question.image_id


def published_failures(run: Run) -> Iterator[Failed]:
    """Yield the failures in published parts, in the order of the plan, with one part's in memory at a time."""
    retried = run.retried
    healed = {i for sidecar in sidecars(run) for i in sidecar.question_ids if i in retried} if retried else set()
    for sidecar in sidecars(run):
        failures = {
            failure.question_id: failure
            for failure in sidecar.failures
            if retried.get(failure.question_id, sidecar.part) == sidecar.part and failure.question_id not in healed
        }
        for question in run.questions(sidecar.part) if failures else ():
            if question.question_id in failures:
                yield Failed(question, sidecar.part, failures[question.question_id], published=True)


def staged_failures(run: Run) -> Iterator[Failed]:
    """Yield the failures that wait for the rest of their slices, in the order of the plan."""
    published = run.parts_with_sidecar()
    directories = set(run.staging_directories())
    for piece in run.slices:
        if piece.part in published or run.label(piece.part) not in directories:
            continue
        for sequence, result in sorted(run.staged(piece.part).items()):
            if result:  # most are: the plan is not read for them
                continue
            question = run.questions(piece.part)[sequence]
            if run.retried.get(question.question_id, piece.part) != piece.part:
                continue
            try:
                failure = run.read_failure(piece.part, sequence)
            except (FileNotFoundError, DamagedError):  # packed at this moment; or removed, to be computed again
                continue
            yield Failed(question, piece.part, failure, published=False)


def failures_csv(failures: Iterable[Failed]) -> bytes:
    """Return failures as a table."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for failed in failures:
        f = failed.failure
        row = (f.question_id, f.reason, f.message, f.attempts, f.worker, f.time, failed.image_id, failed.part)
        writer.writerow(row)
    return text.getvalue().encode()
