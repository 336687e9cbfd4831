"""How a run looks on the terminal: tables, a live bar with rate and time left, plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Table
from rich.text import Text

from storage.account import Account
from storage.failures import Failed
from storage.run import Run

if TYPE_CHECKING:
    from workers.presence import Presence

_LINE_INTERVAL = 10.0
_SILENCE = 60.0  # seconds without a finished question or part before it is mentioned


class LiveAccount:
    """A progress bar that is fed accounts, for the length of a `with` block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun: tuple[float, int] | None = None
        self._last_line = 0.0
        self._last: tuple[int, int] = (-1, -1)
        self._moved = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeftColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("loading the model", total=None, rate="")

    def __enter__(self) -> LiveAccount:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, account: Account) -> None:
        """Show an account."""
        done = account.written + account.failed + account.staged
        now = time.monotonic()
        if self._begun is None or (
            done > self._begun[1] and self._progress.tasks[self._task].completed == self._begun[1]
        ):
            self._begun = (now, done)  # the rate counts from the first new question: loading the model is not speed
        elapsed = now - self._begun[0]
        rate = f"{(done - self._begun[1]) / elapsed:.1f}/s" if elapsed > 0 and done > self._begun[1] else ""
        if self._last != (done, account.parts_published):
            self._last, self._moved = (done, account.parts_published), now
        failed = f", {account.failed} failed" if account.failed else ""
        silent = f", nothing new for {now - self._moved:.0f} s" if now - self._moved > _SILENCE else ""
        text = f"{account.parts_published}/{account.parts_planned} parts{failed}{silent}"
        self._progress.update(self._task, completed=done, total=account.planned, rate=rate, description=text)
        if not self._console.is_terminal and now - self._last_line >= _LINE_INTERVAL:
            self._console.print(f"{done}/{account.planned} questions, {text} {rate}", highlight=False)
            self._last_line = now


def account_table(run: Run, account: Account) -> Table:
    """Return the account as a table: N planned = N written + N failed + N staged + N outstanding."""
    table = Table(title=run.location, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name in ("planned", "written", "failed", "staged", "outstanding"):
        table.add_row(name, f"{getattr(account, name):,}")
    table.add_row("parts", f"{account.parts_published:,} of {account.parts_planned:,}")
    if run.is_cancelled():
        table.add_row("cancelled", "the command that it was begun with resumes it")
    for reason, number in account.reasons.items():
        table.add_row(f"failed: {reason}", f"{number:,}")
    return table


def workers_table(workers: Sequence[Presence]) -> Table:
    """Return who serves a run: what each is, when it was last heard of, what it has done."""
    table = Table("worker", "state", "model", "on", "last heard of", "questions", title="workers", title_justify="left")
    now = time.time()
    for worker in workers:
        model = f"{worker.model} ({worker.dtype})"
        where = worker.gpu or worker.device
        table.add_row(
            worker.name, worker.state, model, where, f"{max(0.0, now - worker.seen):.0f} s ago", f"{worker.done:,}"
        )
    return table


def account_json(run: Run, account: Account) -> dict[str, Any]:
    """Return the account as a script reads it."""
    return {
        "output_dir": run.location,
        "run_id": run.run_id,
        **asdict(account),
        "finished": account.finished,
        "cancelled": run.is_cancelled(),
        "refusals": run.refusals(),
    }


def failed_table(run: Run, failures: list[Failed]) -> Table:
    """Return failures as a table; nothing is cut off."""
    table = Table(title=f"{run.location}: {len(failures):,} failed", title_justify="left")
    for name in ("question", "reason", "message", "attempts", "worker", "time", "part"):
        table.add_column(name, overflow="fold", justify="right" if name == "attempts" else "left")
    for failed in failures:
        f = failed.failure
        part = str(failed.part) if failed.published else f"{failed.part}, not published yet"
        table.add_row(*map(Text, (f.question_id, f.reason, f.message, str(f.attempts), f.worker, f.time, part)))
    return table


def failed_json(failed: Failed) -> dict[str, Any]:
    """Return a failure as a script reads it."""
    place = {"image_id": failed.image_id, "part": failed.part, "published": failed.published}
    return {**asdict(failed.failure), **place}
