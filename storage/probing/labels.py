"""Labels: which answers are wrong, from a CSV that somebody made, or from the ground truth."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from storage.answers import normalise
from storage.errors import UserError
from storage.images.filetype import refuse_pointer

PUBLISHED = "is_hallucinating_manual"
ANSWER = "model_answer"
MIN_AGREEMENT = 0.95
_MIN_OVERLAP = 0.5  # of the smaller of the two sets of ids: below, they are ids of something else
_BOOLEANS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


@dataclass(frozen=True, slots=True)
class Labels:
    """Question id to whether its answer is wrong, and where that comes from."""

    wrong: dict[str, bool]
    source: str
    unlabelled: int = 0  # questions of the run that the labels do not name
    unknown: int = 0  # labels of questions that the run does not have
    agreement: float | None = None  # of the labelled answers with the run's; None where the labels carry none
    mismatched: tuple[str, ...] = field(default=())  # questions whose label was given to another answer


def read_labels(path: Path, answers: Mapping[str, str], *, column: str | None = None, keep_mismatches: bool = False) -> Labels:
    """Read the labels of a run's questions; `answers` are the run's own, by question id.

    Where the file carries `model_answer`, a label holds for the run only if the two answers agree after normalisation:
    other labels are left out, unless `keep_mismatches`. Raises UserError.
    """
    wrong, labelled_answers, column = _read(path, column)
    common = [name for name in answers if name in wrong]
    if len(common) < _MIN_OVERLAP * min(len(answers), len(wrong)) or not common:
        raise UserError(
            f"{path} labels other questions: {len(common)} of its {len(wrong)} ids are among the run's {len(answers)}. "
            f"It has {_example(wrong)}; the run has {_example(answers)}"
        )
    mismatched: tuple[str, ...] = ()
    agreement = None
    if labelled_answers is not None:
        given = labelled_answers
        mismatched = tuple(name for name in common if normalise(given[name]) != normalise(answers[name]))
        agreement = 1 - len(mismatched) / len(common)
        if agreement < MIN_AGREEMENT and not keep_mismatches:
            name = mismatched[0]
            raise UserError(
                f"{path} labels other answers than the run's: {agreement:.1%} agree, fewer than {MIN_AGREEMENT:.0%}. "
                f"Question {name!r} was answered {given[name]!r} there and {answers[name]!r} here. "
                "Label this run's answers, or add --keep-mismatches"
            )
    left_out = set() if keep_mismatches else set(mismatched)
    return Labels(
        wrong={name: wrong[name] for name in common if name not in left_out},
        source=f"{path.name}, column {column}",
        unlabelled=len(answers) - len(common),
        unknown=len(wrong) - len(common),
        agreement=agreement,
        mismatched=mismatched,
    )


def _read(path: Path, column: str | None) -> tuple[dict[str, bool], dict[str, str] | None, str]:
    """Return the labels and answers in a file by question id, and the labels' column; blank labels are none."""
    try:
        with path.open("rb") as file:
            refuse_pointer(file.peek(), f"--labels {path}")
            reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {path}: not a readable UTF-8 CSV ({error})") from error
    if "question_id" not in names:
        raise UserError(f"{path} has no column question_id; it has {', '.join(names)}")
    column = _column(path, names, rows, column)
    wrong: dict[str, bool] = {}
    answers: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        name, text = row["question_id"] or "", (row[column] or "").strip().lower()
        if name in answers:
            raise UserError(f"{path}, row {number}: question_id {name!r} is there twice")
        answers[name] = (row.get(ANSWER) or "").strip()
        if not text:
            continue
        if text not in _BOOLEANS:
            raise UserError(f"{path}, row {number}: {column} is {row[column]!r}; true or false is meant")
        wrong[name] = _BOOLEANS[text]
    return wrong, answers if ANSWER in names else None, column


def _column(path: Path, names: list[str], rows: list[dict[str, str]], column: str | None) -> str:
    if column is not None:
        if column not in names:
            raise UserError(f"--label-column {column}: {path} has the columns {', '.join(names)}")
        return column
    if PUBLISHED in names:
        return PUBLISHED
    boolean = [name for name in names if name != "question_id" and rows and _is_boolean(rows, name)]
    if len(boolean) == 1:
        return boolean[0]
    found = f"several columns of true and false: {', '.join(boolean)}" if boolean else "no column of true and false"
    raise UserError(f"{path} has {found}; name the one that says an answer is wrong with --label-column")


def _is_boolean(rows: list[dict[str, str]], name: str) -> bool:
    values = {(row[name] or "").strip().lower() for row in rows} - {""}
    return bool(values) and values <= _BOOLEANS.keys()


def _example(names: Mapping[str, object]) -> str:
    return repr(next(iter(names))) if names else "none"
