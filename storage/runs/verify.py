"""Verifying a run: every planned question accounted for exactly once, every vector whole, of the right size and finite.

A part's size and SHA-256 come first: HDF5 can hang for ever on a damaged file, so only one that is as published is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import DamagedError, LayoutError, ObjectStoreError
from storage.fields import EVERY, is_ragged
from storage.hdf5.chunks import CODEC, decode_chunk
from storage.hdf5.columns import Index, read_index
from storage.hdf5.identify import identify_part
from storage.hdf5.layout import open_part
from storage.hdf5.objects import clean
from storage.hdf5.rows import rows_problem
from storage.hdf5.stored import TEXTS, StoredQuestion
from storage.naming import group_key
from storage.question import Question
from storage.runs.pack import Sidecar, read_sidecar, sidecars
from storage.runs.plan import Slice
from storage.runs.run import Run, part_names
from storage.settings import ModelFacts
from storage.stores.object_file import open_raw

_FOREIGN = "is not a part of this run, but readers will take it for one"
_NOT_FINITE = "the model's weights or the run's dtype make them, so computing it again would give the same"
_PLANNED_TEXTS = ("question", "image_id", "ground_truth_answer")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be. `part`: the part that must be computed again to mend it.

    unread: nothing is known of the file, because it could not be looked at; that is no damage, and not to be repaired.
    """

    file: str
    question_id: str | None
    problem: str
    part: int | None = None
    unread: bool = False

    def __str__(self) -> str:
        where = f"{self.file}, question {self.question_id}" if self.question_id is not None else self.file
        return f"{where}: {self.problem}"


def verify(run: Run, *, deep: bool = False) -> Iterator[Finding]:
    """Yield what is wrong with a run's published parts; nothing where all is well.

    `deep` also reads every vector past HDF5, by the column index and its checksums, and compares the texts with the plan's.
    """
    if not run.slices:
        yield Finding(".run/plan", None, "nothing is planned: enqueue was interrupted, run the same command again")
    published, present = run.parts_with_sidecar(), part_names(run.location)
    for piece in run.slices:
        name = run.part_name(piece.part)
        if piece.part in published or name in present:
            yield from verify_slice(run, piece, described=piece.part in published, deep=deep)
        else:
            yield Finding(name, None, f"is not published yet ({piece.size} questions)")
    if run.retried:
        yield from _written_twice(run)
    names = {run.part_name(piece.part) for piece in run.slices}
    for name in present:
        if name not in names:
            yield Finding(name, None, _FOREIGN)


def _written_twice(run: Run) -> Iterator[Finding]:
    """Yield the retried questions that several parts have: readers of all parts would count them twice."""
    parts: dict[str, list[str]] = {}
    for sidecar in sidecars(run):
        for question_id in sidecar.question_ids:
            if question_id in run.retried:
                parts.setdefault(question_id, []).append(sidecar.file)
    for question_id, files in parts.items():
        if len(files) > 1:
            yield Finding(files[-1], question_id, f"is written in {', '.join(files[:-1])} too")


def verify_slice(run: Run, piece: Slice, *, described: bool, deep: bool = False) -> Iterator[Finding]:
    """Yield what is wrong with a slice's file, with a sidecar or without. Raises DamagedError where that is unreadable."""
    try:
        if described:
            yield from verify_part(run, piece, deep=deep)
        elif (finding := verify_undescribed(run, piece)) is not None:
            yield finding
    except ObjectStoreError:  # it is away, or refuses: so it is with all of them
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None else str(error)
        yield Finding(run.part_name(piece.part), None, f"cannot be looked at now: {reason}", unread=True)


def verify_undescribed(run: Run, piece: Slice) -> Finding | None:
    """Return what is wrong with a file that has a part's name and no sidecar. Raises OSError; None where it has gone."""
    name = run.part_name(piece.part)
    try:
        with run.local_part(piece.part) as path:
            verdict = identify_part(path, run.run_id, piece.part, run.slice(piece.part).origin)
    except FileNotFoundError:
        return None
    if verdict == "damaged":
        return Finding(name, None, "HDF5 cannot read it, and it has no sidecar", piece.part)
    waits = "has no sidecar yet: the collector writes it at its next sweep"
    return Finding(name, None, waits if verdict == "ours" else _FOREIGN)


def verify_part(run: Run, piece: Slice, *, deep: bool = False) -> Iterator[Finding]:
    """Yield what is wrong with one published part. Raises DamagedError where its sidecar is unreadable."""
    name = run.part_name(piece.part)
    sidecar = read_sidecar(run, piece.part)
    planned = Counter(question.question_id for question in run.questions(piece.part))
    found = Counter(sidecar.question_ids) + Counter(failure.question_id for failure in sidecar.failures)
    for question_id in planned - found:
        yield Finding(name, question_id, "is planned, but neither written nor failed", piece.part)
    for question_id in found - planned:
        yield Finding(name, question_id, "is there once more than it is planned", piece.part)
    # Without a record of the model nothing can be said of the part, and computing it again would not help.
    again = piece.part if run.model_facts() is not None else None
    with ExitStack() as stack:
        try:
            path = stack.enter_context(run.local_part(piece.part))
        except FileNotFoundError:
            yield Finding(name, None, "was published and is gone", piece.part)
            return
        try:
            if (damage := _damage(path, sidecar)) is not None:
                yield Finding(name, None, damage, piece.part)
                return
            for where, problem, mendable in _content_problems(run, piece, path, sidecar, deep=deep):
                yield Finding(name, where, problem, again if mendable else None)
        except LayoutError as error:
            yield Finding(name, None, error.problem, piece.part)
        except DamagedError as error:
            yield Finding(name, None, f"HDF5 cannot read it: {error.__cause__ or error}", piece.part)


def _content_problems(
    run: Run, piece: Slice, path: Path, sidecar: Sidecar, *, deep: bool
) -> Iterator[tuple[str | None, str, bool]]:
    """Yield problems with the question, and whether it helps to compute the part again."""
    with open_part(path) as part, path.open("rb", buffering=0) as raw_file:
        keys = part.keys
        if set(keys) != {group_key(question_id) for question_id in sidecar.question_ids}:
            yield None, "its groups are not the questions that its sidecar lists", True
        model = run.model_facts()
        columns = read_index(part)
        for field, index in columns.items():
            if np.shape(index) != (len(keys), 3):
                yield None, f"the column index of {field} has the shape {np.shape(index)}, not ({len(keys)}, 3)", True
                return
        rows = {key: row for row, key in enumerate(keys)}
        planned = {question.question_id: question for question in run.questions(piece.part)}
        for question_id in sidecar.question_ids:
            if (key := group_key(question_id)) not in rows:
                continue
            question = part.question(key)
            texts = question.texts()
            yield from ((question_id, *problem) for problem in _problems(question, texts, model))
            index_row = {field: index[rows[key]] for field, index in columns.items()}
            for problem in _index_problems(question, index_row, raw_file if deep else None):
                yield question_id, problem, True
            if deep and question_id in planned:
                for problem in _text_problems(texts, planned[question_id]):
                    yield question_id, problem, True
        if deep and (difference := rows_problem(part)) is not None:
            yield None, difference, True


def _damage(path: Path, sidecar: Sidecar) -> str | None:
    if path.stat().st_size != sidecar.size:
        return f"has {path.stat().st_size} bytes; it was published with {sidecar.size}"
    with open_raw(path) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sidecar.sha256:
            return "its content is not what was published (SHA-256)"
    return None


def _problems(question: StoredQuestion, texts: dict[str, str], model: ModelFacts | None) -> Iterator[tuple[str, bool]]:
    for name in TEXTS:
        if name not in texts:
            yield f"{name} is missing", True
    if model is None:
        yield "the run has vectors, but no record of the model (.run/model.json)", False
        return
    tokens = question.attributes().get("num_answer_tokens") if EVERY in model.answer_states else None
    tokens = int(tokens) if isinstance(tokens, (int, np.integer)) else 0
    for name, width in model.field_widths(images=bool(texts.get("image_id"))).items():
        if (vector := question.vector(name)) is None:
            yield f"{name} is missing", True
        elif vector.shape != (shape := (tokens, width) if is_ragged(name) else (width,)) or vector.dtype != np.float32:
            yield f"{name} is {vector.dtype} {vector.shape}, not float32 {shape}", True
        elif not np.isfinite(vector.read()).all():
            yield f"{name} has values that are not finite: {_NOT_FINITE}", False


def _index_problems(question: StoredQuestion, rows: dict[str, Index], file: Any) -> Iterator[str]:
    """Compare a question's rows of the column index with its datasets; with `file`, the stored bytes and values too."""
    for field, row in rows.items():
        offset, size, crc = row.tolist()
        if (vector := question.vector(field)) is None:
            if size:
                yield f"{field} is in the column index, but not in the group"
            continue
        place, stored = vector.chunk()
        if (place, stored) != (offset, size):
            yield f"{field} lies at {place} with {stored} bytes, not at {offset} with {size}"
        elif file is not None:
            file.seek(offset)
            chunk = file.read(size)
            if CODEC.crc32(chunk) != crc:
                yield f"{field} is damaged (CRC-32)"
                continue
            try:
                values = decode_chunk(chunk, vector.size).T.tobytes()
            except ValueError as error:
                yield f"{field} is damaged: {error}"
                continue
            if values != vector.read().tobytes():
                yield f"{field} has other values by the column index than by HDF5"


def _text_problems(texts: dict[str, str], question: Question) -> Iterator[str]:
    for name in _PLANNED_TEXTS:
        planned = clean(getattr(question, name))
        if (stored := texts.get(name, planned)) != planned:
            yield f"{name} is {stored!r}, but {planned!r} in the plan"
