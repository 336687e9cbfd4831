"""CSV, and VLMEvalKit's TSV with images in base64: tables of lines, by the stdlib's reader in strict mode.

It names the line of a fault, and `001`, `NA` and an empty answer stay what they are; pandas parses numbers and missing values,
mends a bad quote in silence and names no line.
"""

from __future__ import annotations

import ast
import binascii
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from producer.dataset.faults import Faults
from producer.dataset.forms.file import TableFile, as_utf8, opened_file
from producer.dataset.forms.row import Embedded, Opened, Row, RowFault, Same
from producer.show.progress import Done, counted
from storage.errors import UserError
from storage.images.decoding import MAX_IMAGE_BYTES

# Characters: csv's own 131,072 is too few for some texts, and without a limit a quote never closed would eat the file.
MAX_FIELD = 1 << 20
_MAX_BASE64 = MAX_IMAGE_BYTES // 3 * 4
_IMAGE = "image"
_SHORTEST = 64  # characters of base64: what is shorter names another row (VLMEvalKit)


class Delimited(TableFile):
    """A `.csv`, or a `.tsv`; `.gz` behind it or not. Takes UTF-8 with or without a byte-order mark; skips empty lines."""

    def __init__(self, path: Path, *, tabs: bool) -> None:
        super().__init__(path)
        self._tabs = tabs

    @contextmanager
    def opened(self, faults: Faults, done: Done) -> Iterator[Opened]:
        """Read the table; a row's place is the file's line on which it starts."""
        limit = csv.field_size_limit(_MAX_BASE64 if self._tabs else MAX_FIELD)  # of the whole process, so it is put back
        try:
            with opened_file(self._path) as (data, digested):
                text = as_utf8(data)
                # By the file's bytes: how many rows it has is known at its end.
                records = counted(_records(text, faults, tabs=self._tabs), lambda _: done(digested.size))
                line, names = next(records, (0, []))
                if faults.number:
                    raise UserError(f"{self._path}: the line that names the columns cannot be read\n{faults}")
                columns = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(names)]  # as pandas names them
                yield Opened(f"line {line}", columns, self._rows(records, columns, faults))
            self.sha256 = digested.sha256.hexdigest()
        finally:
            csv.field_size_limit(limit)

    def _rows(self, records: Iterator[tuple[int, list[str]]], columns: list[str], faults: Faults) -> Iterator[Row]:
        width = len(columns)
        for line, cells in records:
            where = f"line {line}"
            if len(cells) != width:
                separator, what = ("tabs", "a tab") if self._tabs else ("commas", "a comma")
                too_many = len(cells) > width
                hint = f"put a text that holds {separator} in quotes" if too_many else f"write {what} for each empty field too"
                faults.add(f"{where}: {len(cells)} fields where the first line has {width}: {hint}")
                continue
            row: dict[str, Any] = dict(zip(columns, cells))
            if self._tabs and _IMAGE in row:
                try:
                    row[_IMAGE] = in_base64(row[_IMAGE])
                except RowFault as error:
                    faults.add(f"{where}: {error}")
                    continue
            yield Row(where, row)


def in_base64(text: str) -> list[Embedded | Same]:
    """Return the images of VLMEvalKit's column: one in base64, a list of them, or the index of another row.

    Raises RowFault where it is none of these.
    """
    text = text.strip()
    if text.startswith("["):
        try:
            several = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise RowFault("the image is no list of images in base64: write the table again") from error
        return [image for one in several for image in in_base64(str(one))]
    if len(text) <= _SHORTEST:
        return [Same(text)] if text else []
    try:
        return [Embedded(binascii.a2b_base64("".join(text.split()), strict_mode=True))]
    except (binascii.Error, ValueError) as error:
        raise RowFault(f"the image is no base64 ({error}): write the table again, or name files in image_path") from error


def _records(file: TextIO, faults: Faults, *, tabs: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield each record after the number of the line on which it starts; list a malformed one as a fault."""
    reader = csv.reader(file, strict=True, delimiter="\t" if tabs else ",")
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            run = f" (the record runs on to line {reader.line_num})" if reader.line_num > line else ""
            faults.add(f"line {line}: {_quoting_problem(error)}{run}")
            continue
        if row:
            yield line, row


def _quoting_problem(error: csv.Error) -> str:
    if "field limit" in str(error):
        return f"a field has more than {csv.field_size_limit():,} characters: close its quote or shorten the text"
    return f'the quotes do not match ({error}): write a quote inside a quoted text twice, as in "a ""word"" in quotes"'
