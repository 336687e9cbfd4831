"""The table: the dataset's CSV, read and checked before anything is planned. It knows no images.

Whatever is wrong is said at once, every faulty line in one message, so that a file is mended in one go.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from producer.dataset.faults import Faults, short
from producer.show.progress import Done, Phases, counted, silent
from storage.errors import UserError
from storage.hdf5.part import QUESTION_ATTRIBUTES
from storage.images.filetype import refuse_pointer
from storage.question import Question

# Accepted names of each column, the preferred one first; the other is carried where a table has both.
_COLUMNS = {
    "question_id": ("question_id",),
    "image_id": ("image_id", "image_name"),
    "question": ("question",),
    "answer": ("answer", "gt_answer"),
}
# Characters: csv's own 131,072 is too few for some texts, and without a limit a quote never closed would eat the file.
_MAX_FIELD = 1 << 20
_BUFFER = 1 << 16
_MAX_NAME = 512  # characters of a question id or a column's name, which become names in HDF5: 64 KiB there at most
_MAX_COLUMNS = 20  # named in a message
_NOT_TEXT = re.compile(r"nan|NaN|None|null|NULL|[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BAD_CHARACTER = re.compile(r"[\0\ud800-\udfff]")  # a surrogate stands for a byte that was not UTF-8: see _open


@dataclass(frozen=True, slots=True)
class _Header:
    """Where a table's columns are: indices into a row."""

    width: int
    question_id: int
    image_id: int
    question: int
    answer: int | None
    extra: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A dataset's questions in the file's order, and the SHA-256 of the bytes that they were read from."""

    questions: list[Question]
    sha256: str


def read_table(csv_path: Path, phases: Phases = silent) -> Table:
    """Return the questions of a `.csv` or `.csv.gz`, every field the text that it is in the file.

    The stdlib reader in strict mode, because it names the line of a fault and because `001`, `NA` and an empty answer
    stay what they are; pandas parses numbers and missing values, mends a bad quote in silence and names no line.
    Takes UTF-8 with or without a byte-order mark; skips empty lines. Raises UserError with every faulty line (the first
    20 in full) and its fix; a line number is that of the file's line on which the record starts. The file is read once: one
    that takes its place meanwhile changes nothing.
    """
    if not os.path.isfile(csv_path):
        raise UserError(f"{csv_path} {_what(csv_path)}: name the dataset's CSV file (.csv or .csv.gz)")
    limit = csv.field_size_limit(_MAX_FIELD)  # a setting of the whole process, so it is put back
    try:
        with csv_path.open("rb", buffering=0) as raw, io.BufferedReader(digested := _Digested(raw), _BUFFER) as data:
            refuse_pointer(data.peek(), csv_path)
            done = phases(f"reading {csv_path.name}", os.path.getsize(csv_path))
            with _text(data, csv_path) as file:
                # By the file's bytes: how many rows it has is known at its end.
                questions = _read(file, csv_path, lambda _: done(digested.size))
                while data.read(_BUFFER):  # what lies behind a gzip's end belongs to the file, too
                    pass
            return Table(questions, digested.sha256.hexdigest())
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{csv_path} is damaged gzip ({e}): copy or make it again; `gzip -t` checks it") from e
    except OSError as e:
        raise UserError(f"{csv_path} cannot be read: {e.strerror or e}") from e
    finally:
        csv.field_size_limit(limit)


class _Digested(io.RawIOBase):
    """A file of which the digest is taken as it is read."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; return how many."""
        number = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:number])
        self.size += number
        return number


def _what(path: Path) -> str:
    if os.path.isdir(path):
        return "is a directory"
    return "is not a regular file" if os.path.exists(path) else "does not exist"


def _text(data: BinaryIO, path: Path) -> TextIO:
    # surrogateescape: a byte that is not UTF-8 reaches the check of its row, which knows the line.
    # newline: csv asks for it, so that a line break inside quotes stays what it is.
    plain = gzip.GzipFile(fileobj=data) if path.suffix.lower() == ".gz" else data
    return io.TextIOWrapper(plain, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read(file: TextIO, path: Path, done: Done) -> list[Question]:
    faults = Faults()
    records = counted(_records(file, faults), done)
    header = _read_header(records, faults, path)
    questions = []
    lines: dict[str, int] = {}  # line of each question id
    share: dict[str, str] = {}  # one object for each repeated text: 100,000 image ids instead of a million
    extra: dict[str, str] = {}
    for csv_row, (line, row) in enumerate(records, start=1):
        problems = _row_problems(row, line, header, lines)
        if problems:
            faults.add(f"line {line}: {'; '.join(problems)}")
        if faults.number:
            continue
        if header.extra:
            extra = {name: share.setdefault(row[i], row[i]) for name, i in header.extra}
        image_id = share.setdefault(row[header.image_id], row[header.image_id])
        answer = "" if header.answer is None else share.setdefault(row[header.answer], row[header.answer])
        questions.append(Question(row[header.question_id], image_id, row[header.question], answer, csv_row, extra))
    if faults.number:
        raise UserError(f"{path}: {faults.number:,} faulty {'line' if faults.number == 1 else 'lines'}\n{faults}")
    if not questions:
        raise UserError(f"{path} has no rows: its first line names the columns, a question a line must follow")
    return questions


def _records(file: TextIO, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """Yield each record after the number of the line on which it starts; list a malformed one as a fault."""
    reader = csv.reader(file, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            run = f" (the record runs on to line {reader.line_num})" if reader.line_num > line else ""
            faults.add(f"line {line}: {_quoting_problem(e)}{run}")
            continue
        if row:
            yield line, row


def _quoting_problem(error: csv.Error) -> str:
    if "field limit" in str(error):
        return f"a field has more than {_MAX_FIELD:,} characters: close its quote or shorten the text"
    return f'the quotes do not match ({error}): write a quote inside a quoted text twice, as in "a ""word"" in quotes"'


def _read_header(records: Iterator[tuple[int, list[str]]], faults: Faults, path: Path) -> _Header:
    line, names = next(records, (0, []))
    if faults.number:
        raise UserError(f"{path}: the line that names the columns cannot be read\n{faults}")
    if not names:
        raise UserError(f"{path} is empty: its first line must name the columns, as in {','.join(_COLUMNS)}")
    names = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(names)]  # as pandas names them
    where = {column: _find(names, accepted) for column, accepted in _COLUMNS.items()}
    question_id, image_id, question = where["question_id"], where["image_id"], where["question"]
    problems = _header_problems(names, [c for c, i in where.items() if i is None and c != "answer"])
    if problems or question_id is None or image_id is None or question is None:
        raise UserError(f"{path}, line {line}: {'; '.join(problems)}")
    extra = tuple((name, i) for i, name in enumerate(names) if i not in where.values())
    return _Header(len(names), question_id, image_id, question, where["answer"], extra)


def _find(names: Sequence[str], accepted: Sequence[str]) -> int | None:
    return next((names.index(name) for name in accepted if name in names), None)


def _header_problems(names: Sequence[str], missing: Sequence[str]) -> list[str]:
    if any(_BAD_CHARACTER.search(name) for name in names):
        return ["the columns' names are not UTF-8 text: save the table as CSV in UTF-8 (gzip only as .csv.gz)"]
    problems = []
    if missing:
        more = ", …" if len(names) > _MAX_COLUMNS else ""
        problems += [f"no column {' or '.join(_COLUMNS[column])}" for column in missing]
        problems.append(f"the columns are {', '.join(map(short, names[:_MAX_COLUMNS]))}{more}")
        for mark, word in ((";", "semicolons"), ("\t", "tabs")):
            if mark in "".join(names):
                problems.append(f"it looks separated by {word}: save it with commas")
    for name, number in Counter(names).items():
        if number > 1:
            problems.append(f"{number} columns are named {short(name)}: rename or remove all but one")
        elif name in QUESTION_ATTRIBUTES - {"question_id"}:
            problems.append(f"column {name!r} has a name that the output itself uses: rename it")
        elif len(name) > _MAX_NAME:
            problems.append(f"column {short(name)} has a name of more than {_MAX_NAME} characters: shorten it")
    return problems


def _row_problems(row: Sequence[str], line: int, header: _Header, lines: dict[str, int]) -> list[str]:
    """Return what is wrong with a row, each with its fix; note its id's line in `lines`."""
    if len(row) != header.width:
        too_many = len(row) > header.width
        hint = "put a text that holds commas in quotes" if too_many else "write a comma for each empty field too"
        return [f"{len(row)} fields where the first line has {header.width}: {hint}"]
    problems = []
    question_id, question = row[header.question_id], row[header.question]
    text = "".join(row)
    if "\0" in text or (not text.isascii() and _BAD_CHARACTER.search(text)):
        problems.append(_character_problem(text))
    if not question_id.strip():
        problems.append("question_id is blank: give each row an id of its own")
    elif len(question_id) > _MAX_NAME:
        problems.append(f"question_id has {len(question_id):,} characters: use at most {_MAX_NAME}")
    elif (first := lines.setdefault(question_id, line)) != line:
        problems.append(f"question_id {short(question_id)} is that of line {first} too: give each row an id of its own")
    if not row[header.image_id].strip():
        problems.append("the image id is blank: name the image's file")
    if not question.strip():
        problems.append("the question is blank: write it or remove the row")
    elif _NOT_TEXT.fullmatch(question.strip()):
        fix = "export the table again with its words, or remove the row"
        problems.append(f"question_not_text: the question is {short(question)}: {fix}")
    return problems


def _character_problem(text: str) -> str:
    if "\0" in text:
        return "the row holds a NUL character: remove it"
    byte = next(ord(character) - 0xDC00 for character in text if _BAD_CHARACTER.match(character))
    return f"byte 0x{byte:02x} is not UTF-8: save the table as CSV in UTF-8"
