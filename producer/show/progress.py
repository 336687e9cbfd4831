"""Bars for the phases of a command that takes a while: on a terminal alone, and gone when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import Progress, TextColumn

from storage.screen.console import Console
from storage.screen.terminal import one_line

T = TypeVar("T")
Done = Callable[[int], object]  # is called with how much of a phase is done
Phases = Callable[[str, int], Done]  # is given a phase's name and its whole
_STEP = 1000  # items between two calls


def silent(_name: str, _whole: int) -> Done:
    """Show nothing."""
    return lambda _: None


@contextmanager
def bars(console: Console) -> Iterator[Phases]:
    """Show a bar for each phase that is begun."""
    columns = Progress.get_default_columns()[1:]  # the first takes a name for markup
    with Progress(
        TextColumn("{task.description}", markup=False),
        *columns,
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    ) as progress:

        def begin(name: str, whole: int) -> Done:
            task = progress.add_task(one_line(name), total=whole)
            return lambda number: progress.update(task, completed=number)

        yield begin


def counted(items: Iterable[T], done: Done, *, step: int = _STEP) -> Iterator[T]:
    """Yield items, and tell now and then how many of them have been used."""
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if number % step == 0:
            done(number)
    done(number)
