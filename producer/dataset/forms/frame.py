"""A pandas frame in memory, as notebooks have tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from producer.dataset.faults import Faults
from producer.dataset.forms.row import Opened, Row, as_text
from producer.show.progress import Done, counted

if TYPE_CHECKING:
    import pandas as pd


class Frame:
    """A frame: a question a row; the index does not count. What pandas takes for missing is empty."""

    image: str | None = None
    line = "row"

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self.sha256 = ""

    @property
    def size(self) -> int:
        """Rows."""
        return len(self._frame)

    @contextmanager
    def opened(self, _faults: Faults, done: Done) -> Iterator[Opened]:
        """Read the frame; its digest is that of its cells."""
        digest = hashlib.sha256()
        columns = [str(name) for name in self._frame.columns]
        digest.update(json.dumps(columns).encode())

        def rows() -> Iterator[Row]:
            for number, values in enumerate(self._frame.itertuples(index=False, name=None), start=1):
                cells = {name: _present(value) for name, value in zip(columns, values)}
                told = [hashlib.sha256(v).hexdigest() if isinstance(v, bytes) else as_text(v) for v in cells.values()]
                digest.update(json.dumps(told).encode())
                yield Row(f"row {number}", cells)

        yield Opened("its columns", columns, counted(rows(), done))
        self.sha256 = digest.hexdigest()


def _present(value: Any) -> Any:
    """Return a cell, None where pandas takes it for missing."""
    import pandas as pd

    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value
