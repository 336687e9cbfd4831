"""Looking, and changing nothing: `check` before a run, `status` of one."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from producer.commands.common import AsJson, CacheDir, Directory, Quiet, interrupt, print_hints, print_lost
from producer.options import RunOptions, with_run_options
from storage.errors import UserError
from storage.screen.console import Console
from storage.screen.terminal import echo, echo_json, one_line

if TYPE_CHECKING:
    from storage.runs.account import Account, Bookkeeper
    from storage.runs.run import Run

_WATCH_INTERVAL = 1.0
_LISTENERS_INTERVAL = 10.0


@partial(with_run_options, leave_out=("repair", "relocate", "append"))
def check(
    options: RunOptions,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image whole, not its header alone.")] = False,
    sample: Annotated[
        int, typer.Option(min=0, help="Questions to run through the model, for speed and memory. 0 loads no model.")
    ] = 0,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Look at a dataset before a run, with the options of that run; write nothing.

    Exit code 0: nothing found. 1: questions would fail, or the data may not be what is meant. 2: `run` would refuse it.

    Example: producer check vqa.csv --images-dir images/ --sample 64
    """
    from producer.check.check import check as look
    from producer.check.report import check_json, print_check
    from producer.show.progress import bars
    from workers.checks.trial import TRIAL_ERRORS

    try:
        with bars(Console(stderr=True, quiet=quiet or as_json)) as phases:
            checked = look(options, decode=decode, sample=sample, cache_dir=cache_dir, phases=phases)
    except TRIAL_ERRORS as error:
        raise UserError(f"--sample {sample}: {error}") from None
    if as_json:
        echo_json(check_json(checked))
    elif not quiet:
        print_check(checked, Console())
    raise SystemExit(checked.exit_code)


def status(
    directory: Directory,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay, with bars, rate, time left and workers, until the run ends.")
    ] = False,
    failed: Annotated[bool, typer.Option("--failed", help="List the failed questions instead.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Stay, with a web page of the run for this machine alone, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the page; 0 is any free one. [default: 5556]", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Account for every planned question, from the files alone, and say if no worker serves the run.

    With --watch the exit code is that of `producer run`: 0, every question is written; 1, some failed; 4, a published part
    is gone or cut; 130, the run was cancelled.

    With --serve it prints the address of a web page, which is read-only and renews itself.

    Example: producer status output/ --watch
    """
    from producer.show.display import account_json, account_table, workers_table
    from producer.show.listeners import listening_workers
    from storage.runs.account import Bookkeeper
    from storage.runs.run import Run

    if (serve and (watch or failed or as_json)) or (port is not None and not serve):
        raise UserError("--serve goes with --port, and with no other option; --port with --serve alone")
    run = Run.open(directory)
    if failed:
        _print_failed(run, as_json=as_json)
        return
    _ask_who_serves(run)
    if serve:
        _serve(run, port)
    bookkeeper = Bookkeeper(run)
    account = bookkeeper.account()
    if watch:
        account = _watch(run, bookkeeper, account, quiet=as_json)
    lost = bookkeeper.lost_parts()
    code = 0
    if watch:
        code = 4 if lost else 130 if not account.finished else 1 if account.failed else 0
    listeners = None if account.finished or run.is_cancelled() else listening_workers(run)
    if as_json:
        body = account_json(run, account)
        body["lost_parts"] = lost
        body["workers"] = listeners.names if listeners else []
        body["presence"] = [asdict(worker) for worker in listeners.workers] if listeners else []
        body["problems"] = listeners.problems if listeners else []
        body["note"] = (listeners.note if listeners else "") or None
        body["problem"] = "\n".join(body["problems"]) or None
        echo_json(body)
        raise SystemExit(code)
    Console().print(account_table(run, account))
    if listeners is not None:
        if listeners.workers:
            Console().print(workers_table(listeners.workers))
        if listeners.note:
            echo(listeners.note, err=True)
        print_hints(Console(stderr=True), listeners.problems)
    print_lost(lost)
    for worker, message in run.refusals().items():
        echo(one_line(f"refused by {worker}: {message}"), err=True)
    raise SystemExit(code)


def _ask_who_serves(run: Run) -> None:
    """Name the server of a run that machines share to this process; else it is the one that the environment names."""
    from producer.local.sharing import serving

    if url := serving(run):
        os.environ["HALP_BROKER_URL"] = url
        os.environ.pop("HALP_BROKER_URL_FILE", None)


def _watch(run: Run, bookkeeper: Bookkeeper, account: Account, *, quiet: bool) -> Account:
    from producer.show.listeners import listening_workers, serving_workers
    from producer.show.live import LiveAccount

    console = Console(stderr=True, quiet=quiet)
    looked = float("-inf")
    with LiveAccount(console, run, lambda: serving_workers(run)) as live:
        while not (account.finished or run.is_cancelled()):
            if time.monotonic() - looked > _LISTENERS_INTERVAL:
                found = listening_workers(run)
                note = [found.note] if found.note and looked < 0 else []
                print_hints(console, [*note, *found.problems])
                looked = time.monotonic()
            live.show(account)
            time.sleep(_WATCH_INTERVAL)
            account = bookkeeper.account()
    return account


def _serve(run: Run, port: int | None) -> NoReturn:
    from producer.show.serve import PORT, Server

    signal.signal(signal.SIGTERM, interrupt)
    server = Server(run, PORT if port is None else port)
    try:
        echo(server.url)
        echo("A page to look at, for this machine alone. Ctrl-C ends it.", err=True)
        server.serve_forever()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        server.close()
    raise AssertionError("the server ended by itself")


def _print_failed(run: Run, *, as_json: bool) -> None:
    from producer.show.display import failed_json, failed_list
    from storage.runs.failures import published_failures, staged_failures

    failures = [*published_failures(run), *staged_failures(run)]
    if as_json:
        echo_json({"failures": [failed_json(failed) for failed in failures]})
    else:
        console = Console()
        for shown in failed_list(run, failures):
            console.print(shown)
