"""rich's console and texts, in which nothing from outside is hidden or obeyed: see terminal.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
import rich.text
from rich.segment import Segment

from storage.screen.terminal import visible

RichText = rich.text.Text  # what its methods return
RichConsole = rich.console.Console  # what it gives to whatever renders itself


class Text(rich.text.Text):
    """rich's text, of which hidden characters are seen: cells are measured as they are shown."""

    def __init__(self, text: str = "", *arguments: Any, **options: Any) -> None:
        super().__init__(visible(text), *arguments, **options)


class Console(rich.console.Console):
    """rich's console without markup, which shows what is hidden in whatever it is given."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        """Return a text with its styles."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of anything: the console's own controls, and text."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)
