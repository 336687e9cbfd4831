"""The table: a dataset's questions, read and checked before anything is planned. It opens no image.

Whatever is wrong is said at once, every faulty row in one message, so that a file is mended in one go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from producer.dataset.columns import BAD_CHARACTER, Roles, roles_of
from producer.dataset.faults import Faults, short
from producer.dataset.forms.choice import form_of
from producer.dataset.forms.delimited import MAX_FIELD
from producer.dataset.forms.frame import Frame
from producer.dataset.forms.row import Embedded, Form, Image, Opened, Row, RowFault, Same, as_images, as_text
from producer.show.progress import Done, Phases, silent
from storage.errors import UserError
from storage.images.lookup import EMBEDDED
from storage.question import MAX_IMAGES, Question, image_id_of

if TYPE_CHECKING:
    import pandas as pd

_MAX_ID = 512  # characters of a question id, which becomes a name in HDF5: 64 KiB there at most
_NOT_TEXT = re.compile(r"nan|NaN|None|null|NULL|[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# What stands for an image in other models' tables: `<image>`, `<image 1>`, and Qwen's own.
_PLACEHOLDER = re.compile(r"\s*(?:<image(?:[ _]?\d+)?>|<\|(?:image|video)_pad\|>)\s*")
_IMAGE_PATH = "image_path"  # carries the name that an embedded image has in its table
_NOTHING: dict[str, str] = {}
_PENDING = "\0"  # the image id of a row whose image is another row's, until that is read
_EMPTY = {"line": "its first line must name the columns, as in question_id,image_id,question,answer"}
_NO_ROWS = {"line": "its first line names the columns, a question a line must follow", "file": "there is no image in it"}


@dataclass(frozen=True, slots=True)
class Source:
    """A table's file or folder, and how it is to be read."""

    path: Path
    question: str | None = None  # about each image of a folder
    columns: Mapping[str, str] = field(default_factory=dict)  # role to column
    frame: pd.DataFrame | None = None  # in place of what the path names
    strip_placeholders: bool = False  # such as `<image>`, from the questions
    blind: bool = False  # its questions are asked without their images, which need not be there

    def form(self) -> Form:
        """Return its reader. Raises UserError."""
        return form_of(self.path, self.question) if self.frame is None else Frame(self.frame)


@dataclass(frozen=True, slots=True)
class Table:
    """A dataset's questions in the table's order, and the SHA-256 of what they were read from."""

    questions: list[Question]
    sha256: str
    embedded: dict[str, int] = field(default_factory=dict)  # image id to bytes, of images that lie in the table
    said: str | None = None  # which column was taken for what

    def embedded_of(self, questions: Sequence[Question]) -> dict[str, int]:
        """Return the embedded images of some questions, with their bytes."""
        if not self.embedded:
            return {}
        return {image: self.embedded[image] for question in questions for image in question.images}


def read_table(source: Source | Path, phases: Phases = silent) -> Table:
    """Return a table's questions, every field the text that it is there.

    Raises UserError with every faulty row (the first 20 in full) and its fix. A file is read once: one that takes its place
    meanwhile changes nothing.
    """
    source = source if isinstance(source, Source) else Source(source)
    form, faults = source.form(), Faults()
    done = phases(f"reading {source.path.name}", form.size)
    with form.opened(faults, done) as opened:
        reading = _Reading(source, form, opened, faults)
        questions = reading.questions()
    return Table(questions, form.sha256, reading.embedded, reading.roles.said)


def embedded_images(source: Source, wanted: set[str], done: Done) -> Iterator[tuple[str, bytes]]:
    """Yield, each once, those images of a table that are wanted: id and content. Raises UserError where one is gone."""
    missing, form = set(wanted), source.form()
    with form.opened(Faults(), lambda _: None) as opened:
        first, rows = _peeked(opened)
        roles = roles_of(opened.columns, first, source.columns, form.image, blind=source.blind)
        for row in rows:
            for image in as_images(roles.value("image", row.cells)):
                if isinstance(image, Embedded) and (name := f"{EMBEDDED}/{image.file_name()}") in missing:
                    missing.remove(name)
                    yield name, image.data
                    done(len(wanted) - len(missing))
    if missing:
        raise UserError(f"{source.path} was changed while it was read: give the command again")


class _Reading:
    """One reading of a table."""

    def __init__(self, source: Source, form: Form, opened: Opened, faults: Faults) -> None:
        self._path, self._line, self._faults, self._strip = source.path, form.line, faults, source.strip_placeholders
        self.embedded: dict[str, int] = {}
        self._places: dict[str, str] = {}  # where each question id is
        self._shared: dict[str, str] = {}  # one object for each repeated text: 100,000 image ids instead of a million
        self._same: dict[int, str] = {}  # the places of questions in the list whose image is another row's, and theirs
        if not opened.columns:
            raise UserError(f"{source.path} is empty: {_EMPTY.get(form.line, 'it must hold questions')}")
        first, self._rows = _peeked(opened)
        try:
            self.roles: Roles = roles_of(opened.columns, first, source.columns, form.image, blind=source.blind)
        except ValueError as error:
            raise UserError(f"{source.path}, {opened.where}: {error}") from None

    def questions(self) -> list[Question]:
        """Read all rows. Raises UserError."""
        faults: Faults = self._faults
        found: list[Question] = []
        for number, row in enumerate(self._rows, start=1):
            question = self._question(number, len(found), row)
            if question is not None and not faults.number:
                found.append(question)
        if not faults.number:
            found = self._with_images_of_others(found)
        if faults.number:
            plural = {"entry": "entries"}.get(self._line, f"{self._line}s")
            what = self._line if faults.number == 1 else plural
            raise UserError(f"{self._path}: {faults.number:,} faulty {what}\n{faults}")
        if not found:
            raise UserError(f"{self._path} has no rows: {_NO_ROWS.get(self._line, 'a row for each question must be there')}")
        if self.embedded and any(image not in self.embedded for question in found for image in question.images):
            raise UserError(f"{self._path}: some rows hold their image, others name a file: make a table of each")
        return found

    def _question(self, number: int, index: int, row: Row) -> Question | None:
        roles, cells = self.roles, row.cells
        try:
            images = as_images(roles.value("image", cells))
        except RowFault as error:
            self._faults.add(f"{row.where}: {error}")
            return None
        carried = {name: as_text(cells.get(name)) for name in roles.carried}
        if odd := [r for r in ("question_id", "question") if isinstance(roles.value(r, cells), (list, tuple, dict))]:
            self._faults.add(f"{row.where}: {odd[0]} is a list or an object: write one text")
            return None
        question_id = f"row-{number:06d}" if roles.question_id is None else as_text(roles.value("question_id", cells))
        question, answer = as_text(roles.value("question", cells)), as_text(roles.value("answer", cells))
        if self._strip:
            question = _PLACEHOLDER.sub(" ", question).strip()
        named = [image for image in images if isinstance(image, str)]
        problems = _character_problems((question_id, question, answer, *named, *carried.values()))
        problems += self._problems_of_id(question_id, row.where)
        problems += _problems_of_images(images)
        problems += _problems_of_question(question)
        if problems:
            self._faults.add(f"{row.where}: {'; '.join(problems)}")
            return None
        if inside := [image.name for image in images if isinstance(image, Embedded) and image.name]:
            carried.setdefault(_IMAGE_PATH, image_id_of(inside))
        share = self._shared
        extra = {name: share.setdefault(text, text) for name, text in carried.items()} or _NOTHING
        image_id = image_id_of([self._image_id(image, index) for image in images])
        answer = share.setdefault(answer, answer)
        return Question(question_id, share.setdefault(image_id, image_id), question, answer, number, extra)

    def _image_id(self, image: Image, index: int) -> str:
        if isinstance(image, Embedded):
            name = f"{EMBEDDED}/{image.file_name()}"
            self.embedded[name] = len(image.data)
            return name
        if isinstance(image, Same):
            self._same[index] = image.question_id
            return _PENDING
        return image

    def _with_images_of_others(self, questions: list[Question]) -> list[Question]:
        """Give those questions their images that name another row's."""
        if not self._same:
            return questions
        images = {question.question_id: question.image_id for question in questions}
        for index, wanted in self._same.items():
            if (image_id := images.get(wanted)) and image_id != _PENDING:
                questions[index] = replace(questions[index], image_id=image_id)
            else:
                where = self._places[questions[index].question_id]
                self._faults.add(f"{where}: the image is that of row {short(wanted)}, which has none: embed it there, or here")
        return questions

    def _problems_of_id(self, question_id: str, where: str) -> list[str]:
        if not question_id.strip():
            return ["question_id is blank: give each row an id of its own"]
        if len(question_id) > _MAX_ID:
            return [f"question_id has {len(question_id):,} characters: use at most {_MAX_ID}"]
        if (first := self._places.setdefault(question_id, where)) != where:
            return [f"question_id {short(question_id)} is that of {first} too: give each row an id of its own"]
        return []


def _peeked(opened: Opened) -> tuple[Mapping[str, Any], Iterator[Row]]:
    """Return the cells of the first row, and all rows."""
    first = next(opened.rows, None)
    return ({}, iter(())) if first is None else (first.cells, chain([first], opened.rows))


def _problems_of_images(images: Sequence[Image]) -> list[str]:
    if any(isinstance(image, str) and not image.strip() for image in images):
        return ["the image id is blank: name the image's file, or leave the cell empty for a question without one"]
    if len(images) > 1 and any(isinstance(image, Same) for image in images):
        return ["a list of images holds names: embed them all here, or name files in image_path"]
    return [f"{len(images)} images are named: a question takes up to {MAX_IMAGES}"] if len(images) > MAX_IMAGES else []


def _problems_of_question(question: str) -> list[str]:
    if not question.strip():
        return ["the question is blank: write it or remove the row"]
    if _NOT_TEXT.fullmatch(question.strip()):
        fix = "export the table again with its words, or remove the row"
        return [f"question_not_text: the question is {short(question)}: {fix}"]
    return []


def _character_problems(texts: Sequence[str]) -> list[str]:
    text = "".join(texts)
    if "\0" in text:
        return ["the row holds a NUL character: remove it"]
    if not text.isascii() and (bad := BAD_CHARACTER.search(text)):
        return [f"byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8: save the table as CSV in UTF-8"]
    if len(text) > MAX_FIELD and max(map(len, texts)) > MAX_FIELD:
        return [f"a field has more than {MAX_FIELD:,} characters: shorten the text"]
    return []
