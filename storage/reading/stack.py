"""A stack: one field of several parts, one above the other, of which any rows are read. It holds no vector and no open file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from rich.progress import track

from storage.errors import UserError
from storage.hdf5.columns import Column, Vectors
from storage.screen.console import Console


@dataclass(frozen=True, slots=True)
class Stack:
    """The columns of a field in file order. May be forked and pickled."""

    columns: list[Column]
    starts: list[int]  # of each column among all rows, and their number
    width: int

    def read(self, rows: Sequence[int], *, progress: bool = False) -> Vectors:
        """Return some rows, [len(rows), D], each column's by one read and each row decoded where it belongs."""
        vectors = np.empty((len(rows), self.width), np.float32)
        wanted = np.asarray(rows, np.intp)
        of_column = np.searchsorted(self.starts, wanted, side="right") - 1
        places = np.argsort(of_column, kind="stable")
        numbers, firsts = np.unique(of_column[places], return_index=True)
        groups = list(zip(numbers.tolist(), np.split(places, firsts[1:]), strict=True)) if len(numbers) else []
        console = Console(stderr=True)
        for number, some in track(groups, "reading", console=console, disable=not progress, transient=True):
            self.columns[number].read_into(vectors, some.tolist(), (wanted[some] - self.starts[number]).tolist())
        return vectors


def stacked(columns: list[Column]) -> Stack:
    """Return the stack of some columns of one field. Raises UserError where their widths differ."""
    widths = sorted({column.width for column in columns})
    if len(widths) > 1:
        raise UserError(f"{columns[0].field} has several widths in these files: {', '.join(map(str, widths))}")
    starts = [0, *accumulate(len(column.ids) for column in columns)]
    return Stack(columns, starts, widths[0] if widths else 0)
