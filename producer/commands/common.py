"""What several commands share: options, and lists of what went wrong."""

from __future__ import annotations

import signal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from storage.screen.console import Console
from storage.screen.terminal import echo, one_line

if TYPE_CHECKING:
    from storage.runs.account import Account
    from storage.runs.run import Run

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Directory = Annotated[str, typer.Argument(metavar="DIR", help="The run's output directory or URL.")]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        help="Where a hub model is kept. [default: ./model_cache, or the hub's cache where that has it]",
        show_default=False,
    ),
]


def print_failures(run: Run, account: Account) -> None:
    """Name a run's first failures and the file that has all of them."""
    from storage.runs.failures import published_failures

    echo(f"{account.failed:,} failed; all of them are in {run.store.address('failures.csv')}:", err=True)
    for failed in islice(published_failures(run), 10):
        failure = failed.failure
        echo(one_line(f"  {failure.question_id}: {failure.reason}: {failure.message}"), err=True)
    if account.failed > 10:
        echo(f"  and {account.failed - 10:,} more", err=True)


def print_lost(lost: list[str]) -> None:
    """Name published parts that are gone or cut, and the way to have them again."""
    for sentence in lost[:10]:
        echo(one_line(sentence), err=True)
    if len(lost) > 10:
        echo(f"and {len(lost) - 10:,} more", err=True)
    if lost:
        echo("The command that the run was begun with computes them again with --repair.", err=True)


def print_hints(console: Console, problems: list[str]) -> None:
    """Print what keeps a run from going on."""
    for problem in problems:
        console.print(one_line(problem), style="yellow", highlight=False, soft_wrap=True)


def interrupt(*_: object) -> None:
    """End a command as Ctrl-C does: what SIGTERM is to do."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to all of a job's processes, and its script sends it on
    raise KeyboardInterrupt
