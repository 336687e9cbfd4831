"""Looking into a part: its metadata, its questions, one question's shapes, dtypes and statistics."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import UserError
from storage.hdf5.columns import COLUMN
from storage.hdf5.layout import open_part
from storage.hdf5.part import read_certificate, read_failures
from storage.hdf5.rows import ROWS
from storage.hdf5.stored import TEXTS, StoredQuestion
from storage.naming import group_key, question_id
from storage.reading.source import Source
from storage.runs.failures import published_failures
from storage.sample import COMPUTED_AT
from storage.screen.console import Text
from storage.screen.tables import WIDE, Name, Sentence, Table

_ALL = 118  # columns of a terminal that hold every figure of a vector


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """One vector of a question."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    minimum: float
    maximum: float
    norm: float
    finite: bool


@dataclass(frozen=True, slots=True)
class QuestionSummary:
    """One group of a part."""

    question_id: str
    texts: dict[str, str]
    attributes: dict[str, Any]
    datasets: tuple[DatasetSummary, ...]


@dataclass(frozen=True, slots=True)
class PartSummary:
    """A part: its root attributes, the texts of each question, and one question whole."""

    file: str
    size: int
    attributes: dict[str, Any]
    questions: dict[str, dict[str, str]]
    selected: QuestionSummary | None


def describe_part(path: Path, selected: str | None = None) -> PartSummary:
    """Read a part's summary; the whole question is `selected`, or the first. Raises UserError, DamagedError."""
    with open_part(path) as part:
        keys = part.keys
        key = group_key(selected) if selected is not None else (keys[0] if keys else None)
        if selected is not None and key not in keys:
            first = f", the first is {question_id(keys[0])!r}" if keys else ""
            raise UserError(f"{path} holds no question {selected!r}; it has {len(keys)}{first}")
        read_failures(part), read_certificate(part)  # which are shown as they are meant, not as any text
        return PartSummary(
            file=str(path),
            size=part.size,
            attributes={n: _plain(part.attribute(n)) for n in part.attribute_names() if not _is_for_programs(n)},
            questions={question_id(k): _texts(part.question(k)) for k in keys},
            selected=_describe_question(key, part.question(key)) if key is not None else None,
        )


def find_question(source: str, wanted: str) -> str:
    """Return the part of a directory that has a question with its vectors. Raises UserError where none has it."""
    opened = Source(source)
    for path in opened.read(lambda part: part.path if wanted in part.ids else None):
        if path is not None:
            return str(path)
    for run in opened.runs:
        for failed in published_failures(run):
            if failed.question.question_id == wanted:
                raise UserError(f"question {wanted!r} has failed: {failed.failure.reason}: {failed.failure.message}")
        if any(question.question_id == wanted for piece in run.slices for question in run.questions(piece.part)):
            raise UserError(f"question {wanted!r} is not published yet")
    raise UserError(f"{source} holds no question {wanted!r}")


def part_json(summary: PartSummary) -> dict[str, Any]:
    """Return the summary as a script reads it."""
    body = asdict(summary)
    for name in ("failures", "drift"):
        if name in summary.attributes:
            body["attributes"][name] = json.loads(summary.attributes[name])
    return body


def part_tables(summary: PartSummary, rows: int | None = None) -> list[Table]:
    """Return the summary as tables for a terminal; `rows` bounds the questions shown.

    Texts are `Text`: in a plain string rich would take `[b]` for markup and fail on `[/b]`.
    """
    metadata = Table(summary.file, f"{summary.size / 1e6:.2f} MB", show_header=False)
    attributes = dict(summary.attributes)
    if "failures" in attributes:
        attributes["failures"] = f"{len(json.loads(attributes['failures']))} (storage inspect --json lists them)"
    if "drift" in attributes:
        attributes["drift"] = _drift_line(json.loads(attributes["drift"]))
    for name, value in attributes.items():
        metadata.row((Sentence(name), Sentence(str(value))))
    shown = list(summary.questions.items())[:rows]
    questions = Table(what=f"{len(shown)} of {len(summary.questions)} questions")
    questions.column("question id")
    for name in TEXTS:
        questions.column(name.replace("_", " "), most=40, wide=WIDE if name == "image_id" else 0)
    for name, texts in shown:
        cells = (Name(texts[field]) if field == "image_id" else Sentence(texts[field]) for field in TEXTS)
        questions.row((Name(name), *cells))
    return [metadata, questions, *([_question_table(summary.selected)] if summary.selected else [])]


def _is_for_programs(attribute: str) -> bool:
    return attribute in {ROWS, COMPUTED_AT} or attribute.startswith(COLUMN)


def _drift_line(certificate: dict[str, Any]) -> str:
    """Return the certificate's worst field in one line."""
    measured = {name: f for name, f in certificate["fields"].items() if f["drift"] and f["noise_floor"]}
    answers = "answers agree" if certificate["answers_agree"] else "answers differ"
    if (seconds := certificate.get("seconds")) is not None:
        answers += f"; took {seconds:.2g} s"
    if not measured:
        return f"{answers}; too few samples to measure by"
    worst = max(measured, key=lambda name: measured[name]["drift"]["rms"])
    drift, floor = measured[worst]["drift"], measured[worst]["noise_floor"]
    return f"{answers}; worst rms {drift['rms']:.2g}, max {drift['max']:.2g} ({worst}; noise floor {floor['rms']:.2g})"


def _question_table(question: QuestionSummary) -> Table:
    attributes = ", ".join(f"{k}={v}" for k, v in question.attributes.items() if not isinstance(v, list) or len(v) < 5)
    table = Table(what=f"question {question.question_id}")
    table.caption = Text(attributes)
    least = {"std": WIDE, "mean": _ALL, "min": _ALL, "max": _ALL}
    for name in ("dataset", "shape", "dtype", "mean", "std", "min", "max", "norm"):
        left = name in {"dataset", "dtype"}
        table.column(name, justify="left" if left else "right", whole=name == "dataset", wide=least.get(name, 0))
    for d in question.datasets:
        numbers = (f"{x:.4g}" for x in (d.mean, d.std, d.minimum, d.maximum, d.norm))
        table.row((d.name, str(list(d.shape)), d.dtype if d.finite else f"{d.dtype} NOT FINITE", *numbers))
    return table


def _describe_question(key: str, question: StoredQuestion) -> QuestionSummary:
    vectors = [(name, vector) for name in question.fields() if (vector := question.vector(name)) is not None]
    attributes = {name: _plain(value) for name, value in question.attributes().items()}
    datasets = tuple(_describe_vector(name, vector.read()) for name, vector in vectors)
    return QuestionSummary(question_id(key), _texts(question), attributes, datasets)


def _describe_vector(name: str, values: npt.NDArray[Any]) -> DatasetSummary:
    wide = values.astype(np.float64)
    return DatasetSummary(
        name=name,
        shape=values.shape,
        dtype=str(values.dtype),
        mean=float(wide.mean()),
        std=float(wide.std()),
        minimum=float(wide.min()),
        maximum=float(wide.max()),
        norm=float(np.linalg.norm(wide)),
        finite=bool(np.isfinite(wide).all()),
    )


def _texts(question: StoredQuestion) -> dict[str, str]:
    texts = question.texts()
    return {name: texts.get(name, "") for name in TEXTS}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
