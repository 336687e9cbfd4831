"""What is read together: the parts of one run, or any files of the layout that hold the same kind of vectors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.progress import track

from storage.errors import ADVICE, DamagedError, UnfinishedWarning, UserError
from storage.fields import in_order, is_of_image
from storage.hdf5.columns import COLUMN, Column, column_of
from storage.hdf5.layout import Part, open_part
from storage.hdf5.rows import Columns, read_rows
from storage.hdf5.trouble import named
from storage.runs.pack import read_sidecar
from storage.runs.run import Run, is_run, part_names
from storage.screen.console import Console
from storage.settings import ModelFacts
from storage.stores.location import is_url, join, resolve_location
from storage.stores.object_file import File, ObjectFile, on_this_machine, size_of

T = TypeVar("T")
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

# Root attributes that say what a vector is. Files that differ in one of them do not belong into one array.
KIND = ("model_name", "dtype", "max_new_tokens", *ModelFacts.model_fields)
_BEFORE: dict[str, Any] = {"special_tokens": "text"}  # what a part of ours was that does not say so yet


@dataclass(frozen=True, slots=True)
class OpenPart:
    """A part of a source while it is open."""

    file: Part
    run_id: str | None  # the run that it is of; None in files of the reference script

    @property
    def path(self) -> File:
        """Where it lies."""
        return self.file.path

    @property
    def ids(self) -> list[str]:
        """The questions, in key order."""
        return self.file.ids

    def column(self, field: str) -> Column:
        """Return one field. Raises UserError, naming the fields that there are, where this one is not.

        It is empty where the field is of images, and no question of the part is about one.
        """
        keys = self.file.keys
        if keys and not self.file.has(COLUMN + field) and self.file.question(keys[0]).vector(field) is None:
            if is_of_image(field) and not any(self.rows().get("image_id", [""])):
                return Column(self.path, field, [], 0, None)
            raise UserError(f"{self.path} has no {field}; it has {', '.join(self.fields())}")
        return column_of(self.file, field)

    def fields(self) -> list[str]:
        """Return the names of the vectors: by the column index, or where there is none of the first question."""
        if indexed := [name for name in self.file.attribute_names() if name.startswith(COLUMN)]:
            return sorted((name.removeprefix(COLUMN) for name in indexed), key=in_order)
        return self.file.question(self.file.keys[0]).fields() if self.file.keys else []

    def rows(self) -> Columns:
        """Return the texts and attributes of the questions."""
        return read_rows(self.file)

    def kind(self) -> dict[str, Any]:
        """Return what says which kind of vectors these are."""
        return _kind(self.file)


class Source:
    """Parts in the order of their names, checked to belong together while they are opened one after another."""

    def __init__(self, source: Paths) -> None:
        self.files: list[File] = []
        self.runs: list[Run] = []
        self._parts: dict[str, tuple[Run, int]] = {}  # of the runs: where a part lies, to its run and number
        for path in [source] if isinstance(source, (str, os.PathLike)) else source:
            self.files += self._directory(path) if is_home(path) else [_file(path)]
        if not self.files:
            raise UserError("there is no file to read")

    def _directory(self, path: str | os.PathLike[str]) -> list[File]:
        """Return the parts of a directory; note the run that it is of."""
        location = resolve_location(os.fspath(path))
        home = location if is_url(location) else os.fspath(path)
        files = {name: _file(join(home, name)) for name in part_names(location)}
        run = Run.open(location) if is_run(location) else None
        if not files:
            raise UserError(f"{path}: {'no part of this run is published yet' if run else 'there is no *.h5 in it'}")
        if run is not None:
            if any(str(file) in self._parts for file in files.values()):
                raise UserError(f"{path} is given twice")
            self.runs.append(run)
            names = {run.part_name(piece.part): piece.part for piece in run.slices}
            self._parts |= {str(file): (run, names[name]) for name, file in files.items() if name in names}
        return list(files.values())

    def missing(self) -> int:
        """Return the number of planned questions whose part is not published yet; 0 for files without a plan."""
        return sum(self._missing(run) for run in self.runs)

    def _missing(self, run: Run) -> int:
        there = {number for of, number in self._parts.values() if of is run}
        return sum(piece.size for piece in run.slices if piece.part not in there)

    def warn_if_unfinished(self) -> None:
        """Warn where a run goes on: what is loaded is not all of it."""
        for run in self.runs:
            if missing := self._missing(run):
                text = f"{run.location} is not finished: {missing:,} questions are not published yet"
                warnings.warn(text, UnfinishedWarning, stacklevel=3)

    def read(self, look: Callable[[OpenPart], T], *, download: bool = False, progress: bool = False) -> Iterator[T]:
        """Yield what `look` finds in each part that has questions; the part is open while it looks.

        download: fetch a part of an object store first, and keep the copy until the next is asked for: to read all of it.
        progress: show a bar on stderr.

        Raises UserError where two files are not of one kind, or hold the same question; DamagedError.
        """
        first: tuple[File, str | None] | None = None
        seen: dict[str, File] = {}
        console = Console(stderr=True)
        for listed in track(self.files, "opening", console=console, disable=not progress, transient=True):
            run_id, known = self._described(listed)
            with on_this_machine(known) if download else nullcontext(known) as path:
                with open_part(path) as file:
                    part = OpenPart(file, run_id or file.text("run_id"))
                    if not part.ids:  # of failures alone
                        continue
                    if first is None:
                        first = known, part.run_id
                    elif part.run_id is None or part.run_id != first[1]:  # a run is of one kind, whoever wrote it
                        _refuse_mixture(first[0], part)
                    _refuse_repetition(seen, part)
                    found = look(part)
                yield found

    def _described(self, path: File) -> tuple[str | None, File]:
        """Return the run of a part that has a sidecar, after a look at its size, and the file with what is known of it.

        So a cut part is named before HDF5 sees it, and of a whole one no string need be read: those lie in heaps without a
        checksum, and HDF5 may walk for ever in one that is damaged.
        """
        if isinstance(path, ObjectFile):
            path = replace(path, length=_size(path))
        if (found := self._parts.get(str(path))) is None:
            return None, path
        run, part = found
        try:
            sidecar = read_sidecar(run, part)
        except FileNotFoundError:
            return None, path
        if (size := _size(path)) != sidecar.size:
            raise DamagedError(f"{path} has {size:,} bytes; it was published with {sidecar.size:,}; {ADVICE}")
        return run.run_id, path

    def plan_order(self, ids: list[str]) -> list[int]:
        """Return the rows in the order of the plan, one run after the other; unchanged where there is none."""
        place: dict[str, int] = {}
        for run in self.runs:
            for piece in run.slices:
                for question in run.questions(piece.part):
                    place.setdefault(question.question_id, len(place))
        return sorted(range(len(ids)), key=lambda row: place.get(ids[row], len(place)))


def is_home(source: str | os.PathLike[str]) -> bool:
    """Tell whether a path or URL is that of a directory of parts rather than of a part."""
    return not source.endswith(".h5") if isinstance(source, str) and is_url(source) else Path(source).is_dir()


def _file(path: str | os.PathLike[str]) -> File:
    return ObjectFile(resolve_location(path)) if isinstance(path, str) and is_url(path) else Path(path)


def _size(path: File) -> int:
    with named(path):
        return size_of(path)


def _kind(file: Part) -> dict[str, Any]:
    found = {name: _plain(value) for name in KIND if (value := file.attribute(name)) is not None}
    return (_BEFORE if file.attribute("run_id") is not None else {}) | found


def _refuse_repetition(seen: dict[str, File], part: OpenPart) -> None:
    path = part.path
    for question in part.ids:
        if (other := seen.setdefault(question, path)) is not path:
            raise UserError(f"question {question} is in {other} and in {path}: load one of them, or one after the other")


def _refuse_mixture(first: File, second: OpenPart) -> None:
    with open_part(first) as file:
        ours = _kind(file)
    theirs = second.kind()
    for name in KIND:
        if ours.get(name) != theirs.get(name):
            values = f"{first} has {_show(ours.get(name))}; {second.path} has {_show(theirs.get(name))}"
            raise UserError(f"these files hold different things and must not be mixed: for {name}, {values}")


def _show(value: Any) -> str:
    return "no such attribute" if value is None else repr(value)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
