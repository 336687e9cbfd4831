"""Which form a table has, by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from producer.dataset.forms.delimited import Delimited
from producer.dataset.forms.folder import Folder
from producer.dataset.forms.json_rows import JsonRows
from producer.dataset.forms.parquet import Parquet
from producer.dataset.forms.row import Form
from producer.dataset.forms.webdataset import WebDataset
from storage.errors import UserError

_NAME_IT = "name the dataset's table (.csv, .tsv, .json or .jsonl, with .gz or without, .parquet, .tar, or a folder)"
_SUFFIXES: dict[str, Callable[[Path], Form]] = {  # anything else is a CSV, which may have any name
    ".tsv": lambda path: Delimited(path, tabs=True),
    ".jsonl": lambda path: JsonRows(path, lines=True),
    ".ndjson": lambda path: JsonRows(path, lines=True),
    ".json": lambda path: JsonRows(path, lines=False),
    ".parquet": Parquet,
    ".tar": WebDataset,
    ".tgz": WebDataset,
}


def form_of(path: Path, question: str | None = None) -> Form:
    """Return the reader of a table, or of a folder of images with one question for all. Raises UserError."""
    if os.path.isdir(path):
        return _of_directory(path, question)
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path} {what}: {_NAME_IT}")
    if question is not None:
        raise UserError(f"--question is for a folder of images; the questions of {path} are in it")
    suffix = os.path.splitext(path.name.lower().removesuffix(".gz"))[1]
    make: Callable[[Path], Form] = _SUFFIXES.get(suffix, _csv)
    return make(path)


def _csv(path: Path) -> Form:
    return Delimited(path, tabs=False)


def _of_directory(path: Path, question: str | None) -> Form:
    if question is not None:
        return Folder(path, question)
    if any(name.endswith(".parquet") for name in os.listdir(path)):
        return Parquet(path)
    raise UserError(f"{path} is a directory without .parquet files: {_NAME_IT}; with images, give --question too")
