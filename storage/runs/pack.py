"""Packing: a slice whose questions are all staged becomes a published part, once.

Write a temporary file, flush it, give it its final name unless that exists, describe it in a sidecar computed from what was
published, and only then remove the staged files. A crash at any step, or a second collector at the same time, neither loses
a question nor writes one twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from storage.errors import DamagedError, UserError
from storage.hdf5.identify import identify_part
from storage.hdf5.part import read_header, write_part
from storage.naming import group_key
from storage.question import Question
from storage.runs.run import Run
from storage.sample import Failure, Sample
from storage.settings import faults
from storage.stores.store import sync


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


_SIDECAR = TypeAdapter(Sidecar)


def pack(run: Run, part: int) -> bool:
    """Bring a slice one step to its end: publish it if it is complete, describe it, clean up. Return whether it is published.

    Raises DamagedError where a staged file does not hold what was written: it has been removed, to be computed again.
    """
    name = run.part_name(part)
    if not run.store.exists(run.sidecar_key(part)):
        sidecar = None
        if not run.store.exists(name):
            staged = run.staged(part)
            piece = run.slice(part)
            # Of two parts that are planned with the same question the earlier one is published first, and the later one looks.
            if len(staged) < piece.size or (piece.based_on and set(piece.based_on) - run.parts_with_sidecar()):
                return False
            try:
                sidecar = _publish(run, part, staged)
            except FileNotFoundError:
                if not run.store.exists(name):  # else another collector published it and removed the staged files
                    if run.staged(part) == staged:
                        raise
                    return False  # another collector removed a damaged one
        _describe(run, part, sidecar)
    run.delete_staging(part)
    return True


def read_sidecar(run: Run, part: int) -> Sidecar:
    """Return a published part's sidecar. Raises FileNotFoundError, DamagedError."""
    key = run.sidecar_key(part)
    try:
        sidecar = _SIDECAR.validate_json(run.store.get(key))
        if (sidecar.part, sidecar.run_id, sidecar.file) != (part, run.run_id, run.part_name(part)):
            raise ValueError("it describes another part, or a part of another run")
        return sidecar
    except (ValueError, DamagedError) as error:
        what = faults(error) if isinstance(error, ValidationError) else error
        raise DamagedError(
            f"{run.store.address(key)} is damaged ({what}): the same `producer enqueue … --repair` computes its part again"
        ) from error


def sidecars(run: Run) -> Iterator[Sidecar]:
    """Yield the sidecars of the published parts, in the order of the plan."""
    for part in sorted(run.parts_with_sidecar()):
        yield read_sidecar(run, part)


def _publish(run: Run, part: int, staged: dict[int, bool]) -> Sidecar | None:
    """Write a part and publish it; return what describes it, or None where another collector's is there."""
    questions = run.questions(part)
    failures = _planned_again(run, part, questions) | _written_before(run, part, questions)
    staged = {sequence: result and sequence not in failures for sequence, result in staged.items()}
    unread = sorted(sequence for sequence, result in staged.items() if not result and sequence not in failures)
    failures |= zip(unread, run.read_failures(part, unread))
    failed = [failures[sequence] for sequence in sorted(failures)]
    settings = run.settings_by(run.slice(part).generation)
    with run.store.partial() as temporary:
        write_part(temporary, settings, run.model_facts(), part, _samples(run, part, questions, staged), failed)
        sync(temporary)
        sidecar = _sidecar(run, part, temporary)
        return sidecar if run.store.publish(temporary, run.part_name(part)) else None


def _planned_again(run: Run, part: int, questions: tuple[Question, ...]) -> dict[int, Failure]:
    """Return the questions that a later part has, as its failures: sequence to failure.

    There are some only where a damaged part is packed again after its failures were retried. A question that succeeds at
    both would be written twice. One that the later part leaves to this one is kept here.
    """
    run.refresh()
    found = {}
    for sequence, question in enumerate(questions):
        if (later := run.retried.get(question.question_id, part)) > part:
            found[sequence] = _elsewhere(run, question, later)
    if not found:
        return found
    ours = f"retried: see {run.part_name(part)}"
    for later in {run.retried[failure.question_id] for failure in found.values()} & run.parts_with_sidecar():
        left = {failure.question_id for failure in read_sidecar(run, later).failures if failure.message == ours}
        found = {sequence: failure for sequence, failure in found.items() if failure.question_id not in left}
    return found


def _written_before(run: Run, part: int, questions: tuple[Question, ...]) -> dict[int, Failure]:
    """Return the questions that an earlier part has with vectors, as this one's failures: sequence to failure.

    There are some only where a part was repaired while a retry of its failures was planned. `pack` has seen those parts
    published, and what is published does not change; one that is repaired again leaves to this part what this part has.
    """
    found = {}
    for earlier in run.slice(part).based_on:
        try:
            written = set(read_sidecar(run, earlier).question_ids)
        except FileNotFoundError:
            raise UserError(
                f"part {part} of {run.location} waits: part {earlier}, which has failed questions of it, is being repaired"
            ) from None
        for sequence, question in enumerate(questions):
            if question.question_id in written:
                found[sequence] = _elsewhere(run, question, earlier)
    return found


def _elsewhere(run: Run, question: Question, part: int) -> Failure:
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return Failure(question.question_id, "retried", f"retried: see {run.part_name(part)}", "", 0, "", time)


def _samples(
    run: Run, part: int, questions: tuple[Question, ...], staged: dict[int, bool]
) -> Iterator[tuple[Question, Sample]]:
    # In key order: HDF5 appends to its group index instead of splitting it.
    sequences = sorted((s for s, result in staged.items() if result), key=lambda s: group_key(questions[s].question_id))
    for sequence, sample in zip(sequences, run.read_samples(part, sequences)):
        yield questions[sequence], sample


def _read_back(run: Run, part: int) -> Sidecar:
    """Return what describes the part that is published. Raises UserError where that is something else, or damaged."""
    with run.local_part(part) as path:
        if (verdict := identify_part(path, run.run_id, part, run.slice(part).origin)) != "ours":
            address = run.store.address(run.part_name(part))
            if verdict == "damaged":
                raise UserError(
                    f"{address} is damaged, and was not described before: the same `producer enqueue … --repair` packs it again"
                )
            raise UserError(f"{address} is not part {part} of this run: move it elsewhere")
        return _sidecar(run, part, path)


def _sidecar(run: Run, part: int, path: Path) -> Sidecar:
    header = read_header(path)
    assert header is not None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    return Sidecar(part, run.run_id, run.part_name(part), size, digest, header.question_ids, header.failures)


def _describe(run: Run, part: int, sidecar: Sidecar | None = None) -> None:
    """Write a part's sidecar: what this process has published, or else what it reads back."""
    sidecar = sidecar or _read_back(run, part)
    run.store.put_new(run.sidecar_key(part), json.dumps(asdict(sidecar), ensure_ascii=False, indent=1).encode())
