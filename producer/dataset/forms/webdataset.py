"""WebDataset: a tar in which the files of one question have one name, as img2dataset writes them: read as a stream."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from typing import Any

from producer.dataset.faults import Faults
from producer.dataset.forms.delimited import MAX_FIELD
from producer.dataset.forms.file import TableFile, opened_file
from producer.dataset.forms.row import Embedded, Opened, Row
from producer.show.progress import Done
from storage.errors import UserError
from storage.images.decoding import MAX_IMAGE_BYTES

_IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
_KEY, _IMAGE, _TEXT = "__key__", "__image__", "txt"
_MAX_JSON = 64 * MAX_FIELD


class WebDataset(TableFile):
    """A `.tar`, or a `.tar.gz`."""

    image: str | None = _IMAGE
    line = "entry"

    @contextmanager
    def opened(self, faults: Faults, done: Done) -> Iterator[Opened]:
        """Read the table; a row's place is the name that its files have in common."""
        with opened_file(self._path) as (data, digested):
            try:
                with tarfile.open(fileobj=data, mode="r|*") as tar:
                    rows = self._rows(tar, faults, lambda: done(digested.size))
                    first = next(rows, None)
                    columns = [] if first is None else [*first.cells]
                    yield Opened("its first entry", columns, iter(()) if first is None else chain([first], rows))
            except tarfile.TarError as error:
                raise UserError(f"{self._path} is no tar, or a damaged one ({error}): fetch it again") from error
        self.sha256 = digested.sha256.hexdigest()

    def _rows(self, tar: tarfile.TarFile, faults: Faults, done: Any) -> Iterator[Row]:
        members = (member for member in tar if member.isfile() and not member.name.rpartition("/")[2].startswith("."))
        for key, files in groupby(members, key=lambda member: _key(member.name)):
            cells: dict[str, Any] = {_KEY: key, _IMAGE: []}
            for member in files:
                suffix = member.name[len(key) + 1 :].lower()
                most = MAX_IMAGE_BYTES if suffix in _IMAGES else _MAX_JSON
                if member.size > most:
                    faults.add(f"entry {key}: {member.name} has {member.size:,} bytes, more than {most:,}: leave it out")
                    continue
                if suffix not in _IMAGES | {"json", _TEXT}:
                    continue
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                if suffix in _IMAGES:
                    cells[_IMAGE].append(Embedded(data, member.name))
                elif suffix == _TEXT:
                    cells[_TEXT] = data.decode("utf-8", "surrogateescape").strip("\n")
                else:
                    try:
                        cells |= json.loads(data)
                    except (ValueError, TypeError, RecursionError) as error:
                        faults.add(f"entry {key}: {member.name} is no JSON object ({error}): write it again")
            yield Row(f"entry {key}", cells)
            done()


def _key(name: str) -> str:
    directory, slash, file = name.rpartition("/")
    return directory + slash + file.partition(".")[0]
