"""A stack: one field of several parts, one above the other, of which any rows are read. It holds no vector and no open file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

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
class TokenStack:
    """The columns of a field that has a vector for each token of an answer, in file order. May be forked and pickled."""

    columns: list[Column]
    starts: list[int]
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one token: [D]."""
        return (self.width,)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Return how many tokens some answers have."""
        return [of[row] for column, row in map(self._place, rows) if (of := column.lengths) is not None]

    def read(self, rows: Sequence[int], *, progress: bool = False) -> Any:
        """Return a list of some answers' vectors, [T, D] of each."""
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(bisect_right(self.starts, row) - 1, []).append(place)
        found: list[Any] = [None] * len(rows)
        shown = track(places.items(), "reading", console=Console(stderr=True), disable=not progress, transient=True)
        for number, its in shown:
            wanted = [rows[place] - self.starts[number] for place in its]
            for place, vectors in zip(its, self.columns[number].read_each(wanted), strict=True):
                found[place] = vectors
        return found

    def _place(self, row: int) -> tuple[Column, int]:
        number = bisect_right(self.starts, row) - 1
        return self.columns[number], row - self.starts[number]


@dataclass(frozen=True, slots=True)
class Layered:
    """The stacks of a field at several layers, read together."""

    layers: list[int]
    stacks: list[Stack] | list[TokenStack]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one row: [L, D]."""
        return len(self.stacks), self.stacks[0].width

    def read(self, rows: Sequence[int], *, progress: bool = False) -> Any:
        """Return some rows, [len(rows), L, D]; or of answers' tokens a list, [T, L, D] of each."""
        if isinstance(self.stacks[0], TokenStack):
            found = [stack.read(rows, progress=progress) for stack in self.stacks]
            return [np.stack(layers, axis=1) for layers in zip(*found, strict=True)]
        vectors = np.empty((len(rows), *self.shape), np.float32)
        for place, stack in enumerate(self.stacks):
            stack.read_into(vectors[:, place], rows, progress=progress)
        return vectors


AnyStack = Stack | TokenStack | Layered


def lengths_of(stack: AnyStack, rows: Sequence[int]) -> list[int] | None:
    """Return how many tokens some answers have, where each has a vector; None where each question has one."""
    one = stack.stacks[0] if isinstance(stack, Layered) else stack
    return one.lengths(rows) if isinstance(one, TokenStack) else None


def at_layers(name: str, layer: Layers) -> list[str]:
    """Return the names of a field's vectors at one layer or at several. Raises UserError for none."""
    names = [at_layer(name, k) for k in layer] if isinstance(layer, Iterable) else [at_layer(name, layer)]
    if not names:
        raise UserError(f"at which layers of {name}? The list is empty")
    return names


def layered(field: str, layer: Layers, parts: list[list[Column]]) -> tuple[str, AnyStack]:
    """Return the name and the stack of what was asked for: `parts` has the columns of each part, one for each layer."""
    names = at_layers(field, layer)
    stacks = [stacked([columns[place] for columns in parts]) for place in range(len(names))]
    if not isinstance(layer, Iterable):
        return names[0], stacks[0]
    return field, Layered([int(k) for k in layer], stacks)


def stacked(columns: list[Column]) -> Any:
    """Return the stack of some columns of one field. Raises UserError where their widths differ."""
    widths = sorted({column.width for column in columns if column.ids})
    if len(widths) > 1:
        raise UserError(f"{columns[0].field} has several widths in these files: {', '.join(map(str, widths))}")
    starts = [0, *accumulate(len(column.ids) for column in columns)]
    kind = TokenStack if any(column.lengths is not None for column in columns) else Stack
    return kind(columns, starts, widths[0] if widths else 0)
