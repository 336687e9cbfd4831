"""A row as any reader yields it: named texts, and what a cell holds that is an image."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from producer.dataset.faults import Faults
from producer.show.progress import Done

# Of an embedded image's file in a run, by how it begins: for viewers; a worker goes by the content.
_SUFFIXES = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"), (b"MM\0*", "tif"))


@dataclass(frozen=True, slots=True)
class Embedded:
    """An image that lies in the table itself, and the name that it has there."""

    data: bytes
    name: str = ""

    def file_name(self) -> str:
        """Return its file's name in a run, by its content."""
        suffix = next((suffix for magic, suffix in _SUFFIXES if self.data.startswith(magic)), None)
        if suffix is None:
            suffix = "webp" if self.data[:4] == b"RIFF" and self.data[8:12] == b"WEBP" else "bin"
        return f"{hashlib.sha256(self.data).hexdigest()}.{suffix}"


@dataclass(frozen=True, slots=True)
class Same:
    """The image of another row, by that row's id."""

    question_id: str


Image = str | Embedded | Same
_LONGEST_LIST = 1 << 16  # characters of a list in a text
Cell = Any  # text; an image; a list of images; None where there is nothing


class Row(NamedTuple):
    """One row: where it is in the file, and what each column holds."""

    where: str
    cells: dict[str, Cell]


class Opened(NamedTuple):
    """A table that is being read: where its columns are named, their names, its rows."""

    where: str
    columns: list[str]
    rows: Iterator[Row]


class Form(Protocol):
    """A table in one of the forms."""

    image: str | None  # the column of its images, where the form itself says so
    line: str  # what a row's place is called

    @property
    def sha256(self) -> str:
        """The digest of all that was read, at the end."""
        ...

    @property
    def size(self) -> int:
        """How much there is to be read, in bytes or files: what `done` counts."""
        ...

    def opened(self, faults: Faults, done: Done) -> AbstractContextManager[Opened]:
        """Read the table from its beginning. Raises UserError where nothing of it can be read; rows' faults are added."""
        ...


class RowFault(ValueError):
    """What is wrong with one cell, with its fix."""


def as_text(value: Any) -> str:
    """Return a value of a typed table as the text that a CSV of it would have."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def image_names(text: str) -> list[Image]:
    """Return the images that a text names: none where it is empty, several in a list."""
    if not text:
        return []
    inner = text.strip()
    if inner[:1] + inner[-1:] == "[]":
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(inner) if len(inner) <= _LONGEST_LIST else None
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if not isinstance(found, list):
                break
            if not all(isinstance(one, str) for one in found):
                raise RowFault("the image is a list of something else than names: name each image's file")
            return list(found)
    return [text]


def as_images(value: Any) -> list[Image]:
    """Return the images that a cell of a typed table holds: paths, bytes, or Hugging Face's `{bytes, path}`; or a list.

    A text may be a list of paths in JSON, or as Python prints it. Raises RowFault where it holds something else.
    """
    if isinstance(value, np.ndarray):  # of a frame that was read from Parquet
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        if any(isinstance(one, (list, tuple)) for one in value):
            raise RowFault("the image is a list of lists: name the images in one")
        return [image for one in value for image in ([one] if isinstance(one, str) else as_images(one))]
    if value is None or isinstance(value, str):
        return image_names(value or "")
    if isinstance(value, (Embedded, Same)):
        return [value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [Embedded(bytes(value))]
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        data, path = value.get("bytes"), value.get("path")
        if data or (data is path is None):
            return [Embedded(bytes(data), as_text(path))] if data else []
        if isinstance(path, str):
            return [path]
    raise RowFault(f"the image is {type(value).__name__}, neither a path nor an image's bytes: name its file, or embed it")
