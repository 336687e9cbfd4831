"""Loading: one field of many parts as an array, with a frame of the questions. How to: docs/reading.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from storage.errors import UserError
from storage.hdf5.columns import Column, Vectors
from storage.hdf5.memory import uncollected
from storage.hdf5.rows import Columns
from storage.naming import part_number
from storage.reading.source import OpenPart, Paths, Source
from storage.reading.stack import AnyStack, Layers, at_layers, layered

Order = Literal["plan", "csv", "file"]
# The first columns of a frame, where a part has them; the CSV's other columns and the remaining attributes follow.
FIRST = (
    "question_id", "image_id", "question", "answer", "ground_truth_answer", "csv_row", "part",
    "vision_token_position", "query_token_position",
)  # fmt: skip

_SAMPLE_TEXTS = ("question_id", "image_id", "question", "answer", "ground_truth_answer")
_SAMPLES_AT_ONCE = 64


@dataclass(frozen=True, slots=True, repr=False)
class Loaded:
    """One field of many questions: row k of `vectors` and of `frame` belongs to `ids[k]`."""

    field: str
    ids: list[str]
    vectors: Vectors  # float32 [N, D]; of several layers [N, L, D]; of all tokens of answers a list, of each [T, D]
    frame: pd.DataFrame
    missing: int  # planned questions whose part is not published yet

    def __repr__(self) -> str:
        """Return what there is and how large, not the values."""
        if isinstance(self.vectors, list):
            shape, dtype = f"{len(self.vectors)}, tokens, {', '.join(map(str, self.vectors[0].shape[1:]))}", "float32"
        else:
            shape, dtype = ", ".join(map(str, self.vectors.shape)), self.vectors.dtype
        missing = f", missing={self.missing}" if self.missing else ""
        columns = len(self.frame.columns)
        return f"Loaded({self.field!r}, vectors={dtype} [{shape}], frame={columns} columns{missing})"


@dataclass(frozen=True, slots=True)
class Located:
    """The same before its vectors are read: row k of `frame` is row `rows[k]` of `stack`."""

    field: str
    ids: list[str]
    stack: AnyStack
    rows: list[int]
    frame: pd.DataFrame
    missing: int


@dataclass(frozen=True, slots=True, repr=False)
class StoredSample:
    """One question of a part, with all its vectors as float32."""

    question_id: str
    image_id: str
    question: str
    answer: str
    ground_truth_answer: str
    attributes: dict[str, Any]  # csv_row, positions, finish_reason, …, and the CSV's other columns
    vectors: dict[str, npt.NDArray[np.float32]]  # HALP field to [D]; of all of an answer's tokens to [T, D]

    def __repr__(self) -> str:
        """Return the texts and the names of the vectors, not their values."""
        return (
            f"StoredSample({self.question_id!r}, question={self.question!r}, answer={self.answer!r}, "
            f"vectors={', '.join(self.vectors)})"
        )


def load(
    source: Paths,
    field: str,
    layer: Layers = None,
    *,
    token: str | None = None,
    order: Order = "plan",
    columns: Sequence[str] | None = None,
    progress: bool = False,
) -> Loaded:
    """Return one field of a run's directory, of a directory of parts, of a file, or of a list of these; each may be a URL.

    field: `vision_only_representation`, or `query_token_representation` with its `layer`, or with several: `layer=[0, 14]`.
    token: of `answer_token_representation`: `first`, `last`, `mean`, or `all`, of which the vectors are a list: [T, D] of each
        question, a row for each of its `num_answer_tokens` tokens.
    order: `plan` as the run was planned; `csv` by the CSV's rows; `file` as a loop over the files and their keys gives
        them. Without a plan, `plan` is `file`.
    columns: of the frame; all if None. With none at all (`[]`) the questions' texts and attributes are not read, which
        takes a third of the time.
    progress: show a bar on stderr.

    Raises UserError where the field is not there, or the files do not belong together; DamagedError. Warns with
    UnfinishedWarning where parts of the run are not published yet.
    """
    opened = Source(source)
    opened.warn_if_unfinished()
    found = locate(opened, of_token(field, token), layer, order=order, columns=columns, progress=progress)
    vectors: Any = found.stack.read(found.rows, progress=progress)
    return Loaded(found.field, found.ids, vectors, found.frame, found.missing)


def locate(
    source: Source,
    field: str,
    layer: Layers = None,
    *,
    order: Order = "plan",
    columns: Sequence[str] | None = None,
    progress: bool = False,
) -> Located:
    """Return what `load` does, without the vectors."""
    frame_of = part_frame if columns is None or columns or order == "csv" else _no_frame
    names = at_layers(field, layer)
    found: list[list[Column]] = []
    frames: list[pd.DataFrame] = []
    with uncollected():
        for columns_of, frame in source.read(lambda part: _found(part, names, frame_of), progress=progress):
            found.append(columns_of)
            frames.append(frame)
    ids = [question for one, *_ in found for question in one.ids]
    if found and not ids:
        raise UserError(f"no question has {names[0]}: none of them was asked about an image")
    frame = _joined(frames)
    rows = _ordered(source, ids, frame, order)
    frame = selected(frame.iloc[rows].reset_index(drop=True), columns)
    name, stack = layered(field, layer, found)
    return Located(name, [ids[row] for row in rows], stack, rows, frame, source.missing())


def of_token(field: str, token: str | None) -> str:
    """Return the name of a field of answers' tokens by its kind; of others as it is."""
    return field if token is None else f"{field}/{token}"


def iter_chunks(
    source: Paths, field: str, layer: Layers = None, *, token: str | None = None, columns: Sequence[str] | None = None
) -> Iterator[Loaded]:
    """Yield the same part by part, in file order: for data larger than memory. `missing` is that of the whole run."""
    opened = Source(source)
    opened.warn_if_unfinished()
    field = of_token(field, token)
    names = at_layers(field, layer)
    frame_of = part_frame if columns is None or columns else _no_frame
    for found, frame in opened.read(lambda part: _found(part, names, frame_of)):
        name, stack = layered(field, layer, [found])
        ids = found[0].ids
        if not ids:  # no question of the part is about an image
            continue
        vectors: Any = stack.read(range(len(ids)))
        yield Loaded(name, ids, vectors, selected(frame, columns), opened.missing())


def load_frame(
    source: Paths, *, order: Order = "plan", columns: Sequence[str] | None = None, progress: bool = False
) -> pd.DataFrame:
    """Return the questions alone, without vectors."""
    opened = Source(source)
    opened.warn_if_unfinished()
    frame = _joined(list(opened.read(part_frame, progress=progress)))
    rows = _ordered(opened, frame["question_id"].tolist() if len(frame.columns) else [], frame, order)
    return selected(frame.iloc[rows].reset_index(drop=True), columns)


def iter_samples(source: Paths) -> Iterator[StoredSample]:
    """Yield each question with all its vectors, in file order, a few at a time in memory."""
    opened = Source(source)
    opened.warn_if_unfinished()
    look = opened.read(lambda part: (part.rows(), [part.column(field) for field in part.fields()]), download=True)
    for rows, columns in look:
        names = [name for name in rows if name not in _SAMPLE_TEXTS]
        places = [{question: place for place, question in enumerate(column.ids)} for column in columns]
        number = len(rows["question_id"])
        at_once = _SAMPLES_AT_ONCE if all(column.lengths is None for column in columns) else 1
        for start in range(0, number, at_once):
            some = range(start, min(start + at_once, number))
            ids = rows["question_id"][some.start : some.stop]
            vectors: list[dict[str, npt.NDArray[np.float32]]] = [{} for _ in some]
            for column, place in zip(columns, places, strict=True):
                having = [k for k, question in enumerate(ids) if question in place]
                wanted = [place[ids[k]] for k in having]
                read = column.read_rows(wanted) if column.lengths is None else column.read_each(wanted)
                for k, vector in zip(having, read, strict=True):
                    vectors[k][column.field] = vector
            for k, row in enumerate(some):
                texts = {name: rows[name][row] if name in rows else "" for name in _SAMPLE_TEXTS}
                attributes = {name: rows[name][row] for name in names if rows[name][row] is not None}
                yield StoredSample(**texts, attributes=attributes, vectors=vectors[k])


def part_frame(part: OpenPart) -> pd.DataFrame:
    """Return the questions of an open part in key order."""
    columns: Columns = part.rows()
    number = part_number(part.path.name)
    columns.setdefault("part", [number] * len(part.ids))
    names = [name for name in FIRST if name in columns]
    return pd.DataFrame({name: columns[name] for name in [*names, *(n for n in columns if n not in names)]})


def _no_frame(part: OpenPart) -> pd.DataFrame:
    """Return a row without columns for each question of an open part."""
    return pd.DataFrame(index=range(len(part.ids)))


def _found(part: OpenPart, names: list[str], frame_of: Callable[[OpenPart], pd.DataFrame]) -> tuple[list[Column], pd.DataFrame]:
    """Return columns of a part, and the frame of the questions that have them."""
    columns, frame = [part.column(name) for name in names], frame_of(part)
    if len(columns[0].ids) < len(frame):
        having = set(columns[0].ids)
        frame = frame[[question in having for question in part.ids]].reset_index(drop=True)
    return columns, frame


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _ordered(source: Source, ids: list[str], frame: pd.DataFrame, order: Order) -> list[int]:
    if order == "plan":
        return source.plan_order(ids)
    if order == "csv" and ids:
        if "csv_row" not in frame or frame["csv_row"].isna().any():
            raise UserError("these files do not say where a question was in the CSV (csv_row): use order='file'")
        if frame["csv_row"].dtype.kind not in "iuf":
            raise UserError("in these files csv_row is not a number everywhere: use order='file'")
        rows: list[int] = frame["csv_row"].argsort(kind="stable").tolist()
        return rows
    if order not in {"csv", "file"}:
        raise UserError(f"no such order: {order!r}; there are 'plan', 'csv' and 'file'")
    return list(range(len(ids)))


def selected(frame: pd.DataFrame, columns: Sequence[str] | None) -> pd.DataFrame:
    """Return some columns of a frame, all if None. Raises UserError."""
    if columns is None:
        return frame
    if absent := [name for name in columns if name not in frame]:
        raise UserError(f"there is no column {', '.join(absent)}; there are {', '.join(map(str, frame.columns))}")
    return frame[list(columns)]
