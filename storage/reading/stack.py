"""A stack: one field of several parts, one above the other, of which any rows are read. It holds no vector and no open file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from rich.progress import track

from storage.errors import UserError
from storage.fields import at_layer
from storage.hdf5.columns import Column, Vectors
from storage.screen.console import Console

Layers = int | Sequence[int] | None  # one, several, or none: of a field without layers


@dataclass(frozen=True, slots=True)
class Stack:
    """The columns of a field in file order. May be forked and pickled."""

    columns: list[Column]
    starts: list[int]  # of each column among all rows, and their number
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one row: [D]."""
        return (self.width,)

    def read(self, rows: Sequence[int], *, progress: bool = False) -> Vectors:
        """Return some rows, [len(rows), D], each column's by one read and each row decoded where it belongs."""
        vectors = np.empty((len(rows), self.width), np.float32)
        self.read_into(vectors, rows, progress=progress)
        return vectors

    def read_into(self, vectors: Vectors, rows: Sequence[int], *, progress: bool = False) -> None:
        """Put some rows into an array, [len(rows), D]."""
        wanted = np.asarray(rows, np.intp)
        of_column = np.searchsorted(self.starts, wanted, side="right") - 1
        places = np.argsort(of_column, kind="stable")
        numbers, firsts = np.unique(of_column[places], return_index=True)
        groups = list(zip(numbers.tolist(), np.split(places, firsts[1:]), strict=True)) if len(numbers) else []
        console = Console(stderr=True)
        for number, some in track(groups, "reading", console=console, disable=not progress, transient=True):
            self.columns[number].read_into(vectors, some.tolist(), (wanted[some] - self.starts[number]).tolist())


@dataclass(frozen=True, slots=True)
class Layered:
    """The stacks of a field at several layers, read together."""

    layers: list[int]
    stacks: list[Stack]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one row: [L, D]."""
        return len(self.stacks), self.stacks[0].width

    def read(self, rows: Sequence[int], *, progress: bool = False) -> Vectors:
        """Return some rows, [len(rows), L, D]."""
        vectors = np.empty((len(rows), *self.shape), np.float32)
        for place, stack in enumerate(self.stacks):
            stack.read_into(vectors[:, place], rows, progress=progress)
        return vectors


def at_layers(name: str, layer: Layers) -> list[str]:
    """Return the names of a field's vectors at one layer or at several. Raises UserError for none."""
    names = [at_layer(name, k) for k in layer] if isinstance(layer, Iterable) else [at_layer(name, layer)]
    if not names:
        raise UserError(f"at which layers of {name}? The list is empty")
    return names


def layered(field: str, layer: Layers, parts: list[list[Column]]) -> tuple[str, Stack | Layered]:
    """Return the name and the stack of what was asked for: `parts` has the columns of each part, one for each layer."""
    names = at_layers(field, layer)
    stacks = [stacked([columns[place] for columns in parts]) for place in range(len(names))]
    if not isinstance(layer, Iterable):
        return names[0], stacks[0]
    return field, Layered([int(k) for k in layer], stacks)


def stacked(columns: list[Column]) -> Stack:
    """Return the stack of some columns of one field. Raises UserError where their widths differ."""
    widths = sorted({column.width for column in columns if column.ids})
    if len(widths) > 1:
        raise UserError(f"{columns[0].field} has several widths in these files: {', '.join(map(str, widths))}")
    starts = [0, *accumulate(len(column.ids) for column in columns)]
    return Stack(columns, starts, widths[0] if widths else 0)
