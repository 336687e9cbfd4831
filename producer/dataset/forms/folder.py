"""A folder of images, and one question about each of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from producer.dataset.faults import Faults
from producer.dataset.forms.row import Opened, Row
from producer.show.progress import Done, counted

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class Folder:
    """A directory: its images and those in directories below, in the order of their names. Hidden ones are left out."""

    image: str | None = "image_id"
    line = "file"

    def __init__(self, path: Path, question: str) -> None:
        self._path, self._question = path, question
        self.sha256 = ""

    @property
    def size(self) -> int:
        """Files."""
        return 1

    @contextmanager
    def opened(self, _faults: Faults, done: Done) -> Iterator[Opened]:
        """Read the names; an image's id is its path in the folder, and so is its question's."""
        names = sorted(self._names())
        self.sha256 = hashlib.sha256("\0".join((self._question, *names)).encode(errors="surrogateescape")).hexdigest()
        cells = ({"question_id": name, "image_id": name, "question": self._question} for name in names)
        rows = (Row(f"file {row['image_id']}", row) for row in counted(cells, done))
        yield Opened("the folder", ["question_id", "image_id", "question"], rows)

    def _names(self) -> Iterator[str]:
        for directory, below, files in os.walk(self._path):
            below[:] = [name for name in below if not name.startswith(".")]
            for name in files:
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in _IMAGES:
                    yield os.path.relpath(os.path.join(directory, name), self._path)
