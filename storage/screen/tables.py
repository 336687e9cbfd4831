"""Tables that stay readable on a narrow terminal: fewer columns, titles on lines of their own, long ids cut in the middle."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import rich.table
from rich.cells import cell_len
from rich.console import ConsoleOptions, RenderResult
from rich.measure import Measurement

from storage.screen.console import RichConsole, Text

WIDE = 100  # columns of a terminal from which on a table shows more than the necessary
_LEAST = 12  # cells of an id that still tell it from others


def cut(text: str, width: int) -> str:
    """Return a text of one line in so many cells: what does not fit is left out in the middle, where ids differ least."""
    if cell_len(text) <= width:
        return text
    head, tail = width // 2, (width - 1) // 2
    while head and cell_len(text[:head]) > width // 2:  # wide characters take two cells
        head -= 1
    while tail and cell_len(text[-tail:]) > (width - 1) // 2:
        tail -= 1
    return f"{text[:head]}…{text[-tail:] if tail else ''}"


class Name:
    """An id, a name or a path: one line, cut in the middle where there is no room."""

    def __init__(self, text: str) -> None:
        self._text = Text(text.replace("\n", "\\x0a").replace("\t", "\\x09")).plain

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        yield Text(cut(self._text, options.max_width), no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: RichConsole, options: ConsoleOptions) -> Measurement:
        length = cell_len(self._text)
        return Measurement(min(length, _LEAST), length)


class Sentence:
    """A message: folded between its words. A word that is longer than a line, as a path may be, is cut in the middle."""

    def __init__(self, text: str) -> None:
        self._lines = [line.split(" ") for line in Text(text).plain.expandtabs(4).split("\n")]

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield Text("\n".join(" ".join(cut(word, width) for word in words) for words in self._lines))

    def __rich_measure__(self, console: RichConsole, options: ConsoleOptions) -> Measurement:
        longest = max(cell_len(" ".join(words)) for words in self._lines)
        return Measurement(min(longest, _LEAST), longest)


class Table(rich.table.Table):
    """rich's table with a title above it, as wide as the terminal, and columns that are left out where it is narrow."""

    def __init__(self, place: str = "", what: str = "", *, show_header: bool = True) -> None:
        super().__init__(show_header=show_header, caption_justify="left")
        self._place, self._what = place, what
        self._from: list[int] = []

    def column(
        self, name: str, *, wide: int = 0, justify: Literal["left", "right"] = "left", whole: bool = False,
        most: int | None = None,
    ) -> None:  # fmt: skip
        """Add a column: from terminals of `wide` columns on; `whole` where its cells are never folded."""
        self.add_column(name, justify=justify, no_wrap=whole, overflow="fold", max_width=most)
        self._from.append(wide)

    def row(self, cells: Iterable[str | Name | Sentence]) -> None:
        """Add a row; its texts are shown as they are."""
        self.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        yield from self._title(options.max_width)
        if not self.columns:
            return
        shown = copy.copy(self)
        wide = [*self._from, *[0] * len(self.columns)]
        kept = [column for column, least in zip(self.columns, wide) if least <= options.max_width]
        shown.columns = [replace(column, _index=index) for index, column in enumerate(kept)]
        yield from rich.table.Table.__rich_console__(shown, console, options)

    def _title(self, width: int) -> Iterable[Text]:
        """Yield where it is from and what it is of: on one line, or each on its own."""
        together = ": ".join(filter(None, (self._place, self._what)))
        parts = [together] if cell_len(together) <= width else [self._place, self._what]
        for part in filter(None, parts):
            yield Text(part, style="italic", overflow="fold")
