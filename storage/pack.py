"""Packing: a slice whose questions are all staged becomes a published part, once.

Write a temporary file, flush it, link it to its final name unless that exists, describe it in a sidecar computed from the
published file, and only then remove the staged files. A crash at any step, or a second collector at the same time, neither
loses a question nor writes one twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from storage.errors import DamagedError, UserError
from storage.naming import group_key
from storage.part import is_part_of, read_header, write_part
from storage.plan import Question
from storage.run import Run
from storage.sample import Failure, Sample
from storage.store import sync


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What is known of a published part without opening it."""

    part: int
    run_id: str
    file: str
    size: int
    sha256: str
    question_ids: tuple[str, ...]
    failures: tuple[Failure, ...]


def pack(run: Run, part: int) -> bool:
    """Bring a slice one step to its end: publish it if it is complete, describe it, clean up. Return whether it is published.

    Raises DamagedError where a staged file does not hold what was written: it has been removed, to be computed again.
    """
    if not run.store.exists(run.sidecar_key(part)):
        if not run.part_path(part).exists():
            staged = run.staged(part)
            if len(staged) < run.slice(part).size:
                return False
            try:
                _publish(run, part, staged)
            except FileNotFoundError:
                if not run.part_path(part).exists():  # else another collector published it and removed the staged files
                    if run.staged(part) == staged:
                        raise
                    return False  # another collector removed a damaged one
        _describe(run, part)
    run.delete_staging(part)
    return True


def read_sidecar(run: Run, part: int) -> Sidecar:
    """Return a published part's sidecar. Raises FileNotFoundError, DamagedError."""
    key = run.sidecar_key(part)
    try:
        body = json.loads(run.store.get(key))
        failures = tuple(Failure(**f) for f in body.pop("failures"))
        return Sidecar(**{**body, "question_ids": tuple(body["question_ids"]), "failures": failures})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        path = run.store.path(key)
        raise DamagedError(
            f"{path} is damaged ({error}): the same `producer enqueue … --repair` computes its part again"
        ) from error


def sidecars(run: Run) -> Iterator[Sidecar]:
    """Yield the sidecars of the published parts, in the order of the plan."""
    for part in sorted(run.parts_with_sidecar()):
        yield read_sidecar(run, part)


def _publish(run: Run, part: int, staged: dict[int, bool]) -> None:
    questions = run.questions(part)
    again = _planned_again(run, part, questions)
    staged = {sequence: result and sequence not in again for sequence, result in staged.items()}
    failed = [
        again.get(sequence) or run.read_failure(part, sequence)
        for sequence, result in sorted(staged.items())
        if not result
    ]
    with run.store.partial() as temporary:
        write_part(temporary, run.settings, run.model_facts(), part, _samples(run, part, questions, staged), failed)
        sync(temporary)
        run.store.publish(temporary, run.part_name(part))


def _planned_again(run: Run, part: int, questions: tuple[Question, ...]) -> dict[int, Failure]:
    """Return the questions that a later part has, as its failures: sequence to failure.

    There are some only where a damaged part is packed again after its failures were retried. A question that succeeds at
    both would be written twice.
    """
    run.refresh()
    time = datetime.now(UTC).isoformat(timespec="seconds")
    found = {}
    for sequence, question in enumerate(questions):
        if (later := run.retried.get(question.question_id, part)) > part:
            message = f"retried: see {run.part_name(later)}"
            found[sequence] = Failure(question.question_id, "retried", message, "", 0, "", time)
    return found


def _samples(
    run: Run, part: int, questions: tuple[Question, ...], staged: dict[int, bool]
) -> Iterator[tuple[Question, Sample]]:
    # In key order: HDF5 appends to its group index instead of splitting it.
    for sequence in sorted(
        (s for s, result in staged.items() if result), key=lambda s: group_key(questions[s].question_id)
    ):
        yield questions[sequence], run.read_sample(part, sequence)


def _describe(run: Run, part: int) -> None:
    path = run.part_path(part)
    if not is_part_of(path, run.run_id, part):
        raise UserError(f"{path} is not part {part} of this run: move it elsewhere")
    header = read_header(path)
    assert header is not None
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    sidecar = Sidecar(part, run.run_id, path.name, path.stat().st_size, digest, header.question_ids, header.failures)
    run.store.put_new(run.sidecar_key(part), json.dumps(asdict(sidecar), ensure_ascii=False, indent=1).encode())
