"""What is read together: the parts of one run, or any files of the layout that hold the same kind of vectors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from storage.columns import COLUMN, Column, column_of, open_part
from storage.errors import UnfinishedWarning, UserError
from storage.location import is_url, resolve_location
from storage.naming import field_order, question_id
from storage.rows import Columns, read_rows
from storage.run import Run, is_run
from storage.settings import ModelFacts

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

# Root attributes that say what a vector is. Files that differ in one of them do not belong into one array.
KIND = ("model_name", "dtype", "max_new_tokens", *ModelFacts.model_fields)


@dataclass(frozen=True, slots=True)
class OpenPart:
    """A part while it is open."""

    path: Path
    file: h5py.File
    keys: list[str]
    ids: list[str]  # in key order

    def column(self, field: str) -> Column:
        """Return one field. Raises UserError, naming the fields that there are, where this one is not."""
        if (
            self.keys
            and COLUMN + field not in self.file.attrs
            and not isinstance(self.file[self.keys[0]].get(field), h5py.Dataset)
        ):
            raise UserError(f"{self.path} has no {field}; it has {', '.join(self.fields())}")
        return column_of(self.file, self.keys, self.ids, field)

    def fields(self) -> list[str]:
        """Return the names of the first question's vectors."""
        found: list[str] = []

        def visit(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset) and node.ndim == 1:
                found.append(name)

        if self.keys:
            self.file[self.keys[0]].visititems(visit)
        return sorted(found, key=field_order)

    def rows(self) -> Columns:
        """Return the texts and attributes of the questions."""
        return read_rows(self.file, self.keys, self.ids)

    def run_id(self) -> str | None:
        """Return the run that the part is of; None in files of the reference script."""
        value = self.file.attrs.get("run_id")
        return None if value is None else str(value)

    def kind(self) -> dict[str, Any]:
        """Return what says which kind of vectors these are."""
        return {name: _plain(self.file.attrs[name]) for name in KIND if name in self.file.attrs}


class Source:
    """Parts in the order of their names, checked to belong together while they are opened one after another."""

    def __init__(self, source: Paths) -> None:
        self.run: Run | None = None
        if isinstance(source, (str, os.PathLike)) and (directory := Path(source)).is_dir():
            self.files = sorted(directory.glob("*.h5"))
            self.run = Run.open(directory) if is_run(resolve_location(directory)) else None
            if not self.files:
                what = "no part of this run is published yet" if self.run else "there is no *.h5 in it"
                raise UserError(f"{directory}: {what}")
        else:
            paths = [source] if isinstance(source, (str, os.PathLike)) else list(source)
            if urls := [path for path in paths if isinstance(path, str) and is_url(path)]:
                raise UserError(f"{urls[0]}: copy the parts of an object store to this machine to read them as arrays")
            self.files = [Path(path) for path in paths]
            if not self.files:
                raise UserError("there is no file to read")

    def missing(self) -> int:
        """Return the number of planned questions whose part is not published yet; 0 for files without a plan."""
        if self.run is None:
            return 0
        there = {path.name for path in self.files}
        return sum(piece.size for piece in self.run.slices if self.run.part_name(piece.part) not in there)

    def warn_if_unfinished(self) -> None:
        """Warn where the run goes on: what is loaded is not all of it."""
        if self.run is not None and (missing := self.missing()):
            text = f"{self.run.location} is not finished: {missing:,} questions are not published yet"
            warnings.warn(text, UnfinishedWarning, stacklevel=3)

    def parts(self) -> Iterator[OpenPart]:
        """Yield each part that has questions, open until the next.

        Raises UserError where two files are not of one kind, or hold the same question.
        """
        first: OpenPart | None = None
        kind: dict[str, Any] = {}
        run_id: str | None = None
        seen: dict[str, Path] = {}
        for path in self.files:
            with _open(path) as part:
                if not part.keys:  # of failures alone
                    continue
                if first is None:
                    first, kind, run_id = part, part.kind(), part.run_id()
                elif run_id is None or part.run_id() != run_id:  # a run is of one kind, whichever versions wrote it
                    _refuse_mixture(first.path, kind, path, part.kind())
                for question in part.ids:
                    if (other := seen.setdefault(question, path)) is not path:
                        raise UserError(f"question {question} is in {other} and in {path}: give the files of one run")
                yield part

    def plan_order(self, ids: list[str]) -> list[int]:
        """Return the rows in the order of the plan; unchanged where there is none."""
        if self.run is None:
            return list(range(len(ids)))
        place: dict[str, int] = {}
        for piece in self.run.slices:
            for question in self.run.questions(piece.part):
                place.setdefault(question.question_id, len(place))
        return sorted(range(len(ids)), key=lambda row: place.get(ids[row], len(place)))


@contextmanager
def _open(path: Path) -> Iterator[OpenPart]:
    with open_part(path) as file:
        keys = list(file)
        yield OpenPart(path, file, keys, [question_id(key) for key in keys])


def _refuse_mixture(first: Path, ours: dict[str, Any], second: Path, theirs: dict[str, Any]) -> None:
    for name in KIND:
        if ours.get(name) != theirs.get(name):
            values = f"{first} has {_show(ours.get(name))}; {second} has {_show(theirs.get(name))}"
            raise UserError(f"these files hold different things and must not be mixed: for {name}, {values}")


def _show(value: Any) -> str:
    return "no such attribute" if value is None else repr(value)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
