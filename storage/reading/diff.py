"""Comparing two runs question by question: their vectors field by field, their answers, and who is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from storage.fields import in_order
from storage.hdf5.columns import Column, Vectors
from storage.reading.source import OpenPart, Source
from storage.screen.console import Console
from storage.screen.tables import WIDE, Name, Sentence, Table

_WORST = 5  # questions named for each field


@dataclass(frozen=True, slots=True)
class Worst:
    """A question whose vectors are among those that differ most."""

    question_id: str
    z_rms: float | None
    cosine: float
    maximum: float


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """How far one field is from the other run's.

    z: the difference divided, dimension by dimension, by the first run's standard deviation over its questions: a few massive
    dimensions hide everything else in a cosine. None where nothing varies.
    """

    field: str
    compared: int
    equal: int  # questions whose vectors are the same bit by bit
    cosine_mean: float
    cosine_min: float
    z_rms: float | None
    z_max: float | None
    maximum: float  # of the absolute difference
    worst: tuple[Worst, ...]


@dataclass(frozen=True, slots=True)
class AnswerDifference:
    """A question that was answered otherwise."""

    question_id: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class RunDifference:
    """What two runs differ in. `settings`: root attributes that say what a vector is."""

    compared: int
    settings: dict[str, tuple[Any, Any]]
    fields: tuple[FieldDifference, ...]
    fields_not_compared: dict[str, str]  # with the reason
    answers: tuple[AnswerDifference, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Tell whether questions, answers and every vector are the same. Settings may differ."""
        alone = self.only_in_first or self.only_in_second or self.fields_not_compared or self.answers
        return not alone and all(field.equal == field.compared for field in self.fields)


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two runs: its questions, their answers, its fields part by part."""

    kind: dict[str, Any]
    questions: dict[str, None]
    answers: dict[str, str]
    columns: dict[str, list[Column | None]]  # a part may lack a field


def compare(first: str | Path, second: str | Path, *, progress: bool = False) -> RunDifference:
    """Return what two runs, directories or files of parts, differ in. Raises UserError, DamagedError."""
    a, b = _side(first), _side(second)
    common = [question for question in a.questions if question in b.questions]
    fields: list[FieldDifference] = []
    not_compared: dict[str, str] = {}
    names = sorted(a.columns.keys() | b.columns.keys(), key=in_order)
    for name in track(names, "comparing", console=Console(stderr=True), disable=not progress, transient=True):
        if name not in a.columns or name not in b.columns:
            not_compared[name] = f"only in the {'first' if name in a.columns else 'second'}"
            continue
        widths = sorted({c.width for side in (a, b) for c in side.columns[name] if c is not None and c.ids})
        if len(widths) > 1:
            not_compared[name] = f"of different widths: {', '.join(map(str, widths))}"
        elif (difference := _field_difference(name, a, b)) is not None:
            fields.append(difference)
    kinds = a.kind.keys() | b.kind.keys()
    return RunDifference(
        compared=len(common),
        settings={k: (a.kind.get(k), b.kind.get(k)) for k in sorted(kinds) if a.kind.get(k) != b.kind.get(k)},
        fields=tuple(fields),
        fields_not_compared=not_compared,
        answers=tuple(AnswerDifference(q, a.answers[q], b.answers[q]) for q in common if a.answers[q] != b.answers[q]),
        only_in_first=tuple(question for question in a.questions if question not in b.questions),
        only_in_second=tuple(question for question in b.questions if question not in a.questions),
    )


def difference_tables(difference: RunDifference, rows: int = 10) -> list[Table]:
    """Return the difference as tables for a terminal; `rows` bounds the questions shown."""
    tables = [_fields_table(difference)]
    if reasons := difference.fields_not_compared:
        tables.append(_table("fields that are not compared", ("field", "reason"), list(reasons.items())))
    if worst := _worst(difference):
        title = f"{min(rows, len(worst))} of {len(worst):,} questions that are among the {_WORST} worst of a field"
        tables.append(_table(title, ("question id", "fields", "z: rms, up to"), worst[:rows]))
    if difference.settings:
        lines = [(k, Sentence(str(a)), Sentence(str(b))) for k, (a, b) in difference.settings.items()]
        tables.append(_table("settings that differ", ("setting", "first", "second"), lines))
    if answers := difference.answers:
        title = f"{min(rows, len(answers))} of {len(answers):,} answers that differ"
        texts = [(Name(x.question_id), Sentence(x.first), Sentence(x.second)) for x in answers[:rows]]
        tables.append(_table(title, ("question id", "first", "second"), texts))
    for side, ids in (("first", difference.only_in_first), ("second", difference.only_in_second)):
        if ids:
            title = f"only in the {side}: {min(rows, len(ids))} of {len(ids):,} questions"
            tables.append(_table(title, ("question id",), [(Name(i),) for i in ids[:rows]]))
    return tables


def _fields_table(difference: RunDifference) -> Table:
    table = Table(what=f"{difference.compared:,} questions compared")
    table.column("field", whole=True)
    for name, wide in (("equal", 0), ("cosine: mean", WIDE), ("min", WIDE), ("z: rms", 0), ("max", WIDE)):
        table.column(name, justify="right", wide=wide)
    table.column("max |a-b|", justify="right")
    for f in difference.fields:
        z = (_number(f.z_rms), _number(f.z_max))
        cosines = (f"{f.cosine_mean:.6f}", f"{f.cosine_min:.6f}")
        table.row((f.field, f"{f.equal:,}", *cosines, *z, f"{f.maximum:.3g}"))
    return table


def _worst(difference: RunDifference) -> list[tuple[Name, str, str]]:
    """Return the questions that differ most: in how many fields, and how far at most."""
    found: dict[str, list[float]] = {}
    for field in difference.fields:
        for worst in field.worst:
            found.setdefault(worst.question_id, []).append(worst.z_rms or 0.0)
    ranked = sorted(found.items(), key=lambda item: (-len(item[1]), -max(item[1])))
    return [(Name(question), str(len(z)), _number(max(z))) for question, z in ranked]


def _table(title: str, names: tuple[str, ...], lines: Sequence[tuple[str | Name | Sentence, ...]]) -> Table:
    table = Table(what=title)
    for name in names:
        table.column(name)
    for line in lines:
        table.row(line)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _side(path: str | Path) -> _Side:
    source = Source(path)
    source.warn_if_unfinished()
    side = _Side({}, {}, {}, {})
    parts = 0
    for number, (kind, ids, answers, found) in enumerate(source.read(_look)):
        side.kind.update(kind)
        side.questions.update(dict.fromkeys(ids))
        side.answers.update(zip(ids, answers, strict=True))
        for column in found:
            columns = side.columns.setdefault(column.field, [])
            columns += [None] * (number - len(columns))
            columns.append(column)
        parts = number + 1
    for columns in side.columns.values():
        columns.extend([None] * (parts - len(columns)))
    return side


def _look(part: OpenPart) -> tuple[dict[str, Any], list[str], list[str], list[Column]]:
    answers = part.rows().get("answer", [""] * len(part.ids))
    return part.kind(), part.ids, answers, [part.column(field) for field in part.fields()]


def _field_difference(field: str, a: _Side, b: _Side) -> FieldDifference | None:
    spread = _spread([c for c in a.columns[field] if c is not None])
    varying = spread > 0
    found: list[tuple[Worst, float]] = []  # with the largest z
    equal = 0
    for ids, x, y in _pairs(field, a, b):
        equal += int((x.view(np.uint32) == y.view(np.uint32)).all(axis=(1, 2)).sum())
        wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
        errors = np.abs(wide_x - wide_y)
        norms = np.linalg.norm(wide_x, axis=2) * np.linalg.norm(wide_y, axis=2)
        cosines = np.divide((wide_x * wide_y).sum(axis=2), norms, out=np.ones(norms.shape), where=norms > 0)
        z = errors[..., varying] / spread[varying]
        for row, question in enumerate(ids):
            rms = float(np.sqrt((z[row] ** 2).mean())) if varying.any() else None
            worst = Worst(question, rms, float(cosines[row].min()), float(errors[row].max()))
            found.append((worst, float(z[row].max(initial=0.0))))
    if not found:
        return None
    ranked = sorted((w for w, _ in found if w.maximum > 0), key=lambda w: (-(w.z_rms or 0), w.cosine, -w.maximum))
    all_rms = [w.z_rms for w, _ in found if w.z_rms is not None]
    return FieldDifference(
        field=field,
        compared=len(found),
        equal=equal,
        cosine_mean=float(np.mean([w.cosine for w, _ in found])),
        cosine_min=min(w.cosine for w, _ in found),
        z_rms=float(np.sqrt(np.mean(np.square(all_rms)))) if all_rms else None,
        z_max=max(z for _, z in found) if all_rms else None,
        maximum=max(w.maximum for w, _ in found),
        worst=tuple(ranked[:_WORST]),
    )


def _spread(columns: list[Column]) -> npt.NDArray[np.float64]:
    """Return each dimension's standard deviation over all questions, or tokens, a part in memory at a time."""
    width = max(column.width for column in columns)
    total, number = np.zeros(width), 0
    for values in (piece for column in columns for piece in column.pieces()):
        total += values.sum(axis=0, dtype=np.float64)
        number += len(values)
    mean, squares = total / max(1, number), np.zeros(width)
    for values in (piece for column in columns for piece in column.pieces()):
        squares += ((values - mean) ** 2).sum(axis=0)
    spread: npt.NDArray[np.float64] = np.sqrt(squares / max(1, number))
    return spread


def _pairs(field: str, a: _Side, b: _Side) -> Iterator[tuple[list[str], Vectors, Vectors]]:
    """Yield the vectors of the questions that both have, by the parts of the first: [N, 1, D], or of all tokens [1, T, D]."""
    there = {
        question: (column, row) for column in b.columns[field] if column is not None for row, question in enumerate(column.ids)
    }
    for column in a.columns[field]:
        rows = [] if column is None else [row for row, question in enumerate(column.ids) if question in there]
        if column is None or not rows:
            continue
        ids = [column.ids[row] for row in rows]
        if column.lengths is not None:
            for question, ours in zip(ids, column.read_each(rows), strict=True):
                of, row = there[question]
                if ours.shape == (theirs := next(of.read_each([row]))).shape:  # else the answers are others
                    yield [question], ours[None], theirs[None]
            continue
        other = np.empty((len(ids), column.width), np.float32)
        places: dict[int, list[int]] = {}
        for place, question in enumerate(ids):
            places.setdefault(id(there[question][0]), []).append(place)
        for some in places.values():
            there[ids[some[0]]][0].read_into(other, some, [there[ids[place]][1] for place in some])
        yield ids, column.read_rows(rows)[:, None], other[:, None]
