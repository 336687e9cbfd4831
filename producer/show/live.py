"""A run while it goes on: bars, rate, time left and workers on a terminal; a line now and then where there is none."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from producer.show.display import tried_again, workers_table
from storage.runs.account import Account
from storage.runs.run import Run
from storage.screen.console import Console, Text
from storage.screen.terminal import duration
from storage.stores.location import is_url

if TYPE_CHECKING:
    from workers.monitor.presence import Presence

_LINE_INTERVAL = 10.0
_LOOK_INTERVAL = 5.0  # between two looks at the workers
_WINDOW = 60.0  # seconds that the rate is taken over
_SILENCE = 60.0  # seconds without a finished question or part before it is mentioned
_STATES = {"written": "green", "staged": "cyan", "retrying": "yellow", "failed": "red"}


class LiveAccount:
    """What is shown of a run while it is fed accounts, for the length of a `with` block."""

    def __init__(self, console: Console, run: Run, look: Callable[[], Sequence[Presence]]) -> None:
        self._console, self._run, self._look = console, run, look
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._pace = Pace()
        self._workers: Sequence[Presence] = ()
        self._refused = ""  # who refuses the run, and why the first does
        self._looked = self._last_line = float("-inf")

    def __enter__(self) -> LiveAccount:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def show(self, account: Account) -> None:
        """Show an account."""
        now = time.monotonic()
        self._pace.note(account, now)
        if now - self._looked >= _LOOK_INTERVAL and not self._console.quiet:
            self._workers, self._looked = self._look(), now
            refusals = self._run.refusals()
            self._refused = f"refused by {', '.join(refusals)}: {next(iter(refusals.values()))}" if refusals else ""
        if self._console.is_terminal:
            self._live.update(self._picture(account, now), refresh=True)
        elif now - self._last_line >= _LINE_INTERVAL:
            self._console.print(f"{done(account)}/{account.planned} questions, {self._line(account, now)}",
                                highlight=False, soft_wrap=True)  # fmt: skip
            self._last_line = now

    def _picture(self, account: Account, now: float) -> Group:
        bars = Table.grid(padding=(0, 1))
        retrying = sum(worker.retrying.get(self._run.run_id, 0) for worker in self._workers)
        for state, colour in _STATES.items():
            number = retrying if state == "retrying" else getattr(account, state)
            bar = ProgressBar(total=max(1, account.planned), completed=number, width=40, complete_style=colour,
                              finished_style=colour)  # fmt: skip
            bars.add_row(state, bar, f"{number:,} of {account.planned:,}")
        line = Text(f"{self._run.location}: {self._line(account, now)}")
        return Group(line, bars, *([workers_table(self._workers)] if self._workers else []))

    def _line(self, account: Account, now: float) -> str:
        parts = [f"{account.parts_published:,}/{account.parts_planned:,} parts"]
        parts += [f"{account.failed:,} failed"] if account.failed else []
        parts += filter(None, [tried_again(self._run.run_id, self._workers), self._refused])
        return ", ".join([*parts, *going(self._run, account, self._pace, now)])


class Pace:
    """How fast questions are finished, over the last minute."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()
        self._last: tuple[int, int] | None = None
        self.begun = False  # since when something new is finished: loading the model is not speed
        self.moved = time.monotonic()

    def note(self, account: Account, now: float) -> None:
        """Take in an account."""
        number = done(account)
        if self._last is not None and not self.begun and number == self._last[0]:
            self._points.clear()
        self.begun = self.begun or (self._last is not None and number > self._last[0])
        if self._last != (number, account.parts_published):
            self._last, self.moved = (number, account.parts_published), now
        self._points.append((now, number))
        while now - self._points[0][0] > _WINDOW:
            self._points.popleft()

    def rate(self, now: float) -> float:
        """Return questions a second; 0 while none is finished."""
        (then, number), latest = self._points[0], self._points[-1][1]
        return (latest - number) / (now - then) if now > then else 0.0


def going(run: Run, account: Account, pace: Pace, now: float) -> list[str]:
    """Say how a run gets on: its rate and the time left, or that nothing moves, and the room on its disk."""
    rate, silent = pace.rate(now), now - pace.moved
    said = []
    if rate:
        said.append(f"{rate:.1f}/s, {duration((account.planned - done(account)) / rate)} left")
    elif not pace.begun:
        said.append("waiting for the first question")
    said += [f"nothing new for {duration(silent)}"] if silent > _SILENCE else []
    if not is_url(run.location):
        said.append(f"{shutil.disk_usage(run.location).free / 1e9:.1f} GB of disk free")
    return said


def done(account: Account) -> int:
    """Return how many questions are finished, published or not."""
    return account.written + account.failed + account.staged
