"""Looking into a part with bare h5py: its metadata, its questions, one question's shapes, dtypes and statistics."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.table import Table

from storage.errors import UserError
from storage.naming import group_key

_TEXTS = ("question", "image_id", "answer", "ground_truth_answer")


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

    key: str
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


def describe_part(path: Path, question_id: str | None = None) -> PartSummary:
    """Read a part's summary; the whole question is `question_id`, or the first. Raises UserError."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = "no such file" if not path.exists() else f"not a readable HDF5 file ({error})"
        raise UserError(f"{path}: {reason}") from error
    with file:
        keys = list(file)
        key = group_key(question_id) if question_id is not None else (keys[0] if keys else None)
        if question_id is not None and key not in file:
            raise UserError(f"{path} holds no question {question_id!r}; it has {len(keys)}, the first is {keys[:1]}")
        return PartSummary(
            file=str(path),
            size=path.stat().st_size,
            attributes={name: _plain(value) for name, value in file.attrs.items()},
            questions={k: _texts(file[k]) for k in keys},
            selected=_describe_question(key, file[key]) if key is not None else None,
        )


def part_json(summary: PartSummary) -> dict[str, Any]:
    """Return the summary as a script reads it."""
    body = asdict(summary)
    body["attributes"]["failures"] = json.loads(summary.attributes.get("failures", "[]"))
    return body


def part_tables(summary: PartSummary, rows: int | None = None) -> list[Table]:
    """Return the summary as tables for a terminal; `rows` bounds the questions shown."""
    metadata = Table(title=f"{summary.file}  ({summary.size / 1e6:.2f} MB)", title_justify="left", show_header=False)
    for name, value in summary.attributes.items():
        if name == "failures":
            value = f"{len(json.loads(value))} (storage inspect --json lists them)"
        metadata.add_row(name, str(value))
    shown = list(summary.questions.items())[:rows]
    questions = Table(title=f"{len(shown)} of {len(summary.questions)} questions", title_justify="left")
    questions.add_column("question id")
    for name in _TEXTS:
        questions.add_column(name.replace("_", " "), overflow="fold", max_width=40)
    for key, texts in shown:
        questions.add_row(key, *(texts[name] for name in _TEXTS))
    return [metadata, questions, *([_question_table(summary.selected)] if summary.selected else [])]


def _question_table(question: QuestionSummary) -> Table:
    attributes = ", ".join(f"{k}={v}" for k, v in question.attributes.items() if not isinstance(v, list) or len(v) < 5)
    table = Table(title=f"question {question.key}", title_justify="left", caption=attributes, caption_justify="left")
    for name in ("dataset", "shape", "dtype", "mean", "std", "min", "max", "norm"):
        table.add_column(name, justify="left" if name in {"dataset", "dtype"} else "right")
    for d in question.datasets:
        numbers = (f"{x:.4g}" for x in (d.mean, d.std, d.minimum, d.maximum, d.norm))
        table.add_row(d.name, str(list(d.shape)), d.dtype if d.finite else f"{d.dtype} NOT FINITE", *numbers)
    return table


def _describe_question(key: str, group: h5py.Group) -> QuestionSummary:
    datasets: list[DatasetSummary] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim == 1:
            values = node[:]
            wide = values.astype(np.float64)
            numbers = (wide.mean(), wide.std(), wide.min(), wide.max(), np.linalg.norm(wide))
            finite = bool(np.isfinite(wide).all())
            datasets.append(DatasetSummary(name, values.shape, str(values.dtype), *map(float, numbers), finite))

    group.visititems(visit)
    attributes = {name: _plain(value) for name, value in group.attrs.items()}
    return QuestionSummary(key, _texts(group), attributes, tuple(datasets))


def _texts(group: h5py.Group) -> dict[str, str]:
    return {name: group[name].asstr()[()] if name in group else "" for name in _TEXTS}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
