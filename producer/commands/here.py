"""A whole run on this machine: `run`, and `demo` on data of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from producer.commands.common import AsJson, CacheDir, Quiet, interrupt, print_failures, print_lost
from producer.options import RunOptions, with_run_options
from storage.errors import UserError
from storage.screen.console import Console
from storage.screen.terminal import amount, echo, echo_json
from storage.stores.location import is_url

if TYPE_CHECKING:
    from producer.resuming import Resumption
    from storage.runs.run import Run


@with_run_options
def run(
    options: RunOptions,
    cache_dir: CacheDir = None,
    max_retries: Annotated[
        int | None, typer.Option(min=0, help="Retries of a question after transient errors. [HALP_MAX_RETRIES]")
    ] = None,
    share: Annotated[
        bool,
        typer.Option("--share", help="Share the run with the same command on other machines that see the same directory."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Do everything on this machine: an embedded queue, a worker per GPU (or one on the CPU), the collector.

    Exit code 0: every question is written. 1: some failed; they are in failures.csv. 2: a mistake in the call or the
    input. 3: a process kept dying. 4: a published part is gone or cut. 130: Ctrl-C or
    `producer cancel`. After any of them the same command resumes.

    Example: producer run vqa.csv --images-dir images/ --output-dir output/
    """
    from producer.planning import named_model, plan_run
    from producer.resuming import Resumption
    from producer.show.progress import bars

    if max_retries is not None:
        os.environ["HALP_MAX_RETRIES"] = str(max_retries)
    if share and is_url(options.output_dir):
        raise UserError("--share wants a directory that all machines see; an object store wants a Redis of your own: README.md")
    resumption = Resumption.of(options.output_dir)
    with bars(Console(stderr=True, quiet=quiet or as_json)) as phases:
        planned = plan_run(options, phases)
    model = named_model(options.model)
    raise SystemExit(run_to_end(planned, resumption, cache_dir, model=model, share=share, quiet=quiet, as_json=as_json))


def run_to_end(
    run: Run,
    resumption: Resumption,
    cache_dir: Path | None,
    *,
    model: str | None = None,
    share: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Run on this machine with a progress bar; print how it ended. Return the exit code.

    model: where the run's lies now; where it lay if None.
    share: with the same command on other machines.
    """
    from producer.local.machine import RunStoppedError, run_locally
    from producer.show.display import account_json
    from producer.show.listeners import serving_workers
    from producer.show.live import LiveAccount
    from storage.runs.account import Bookkeeper

    console = Console(stderr=True, quiet=quiet or as_json)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with LiveAccount(console, run, lambda: serving_workers(run)) as live:
            account = run_locally(
                run, resumption, model=model or run.settings.model, cache_dir=cache_dir, show=live.show, share=share
            )
    except KeyboardInterrupt:
        console.print("Stopped. What is finished is kept; the same command resumes.")
        return 130
    except RunStoppedError as error:
        echo(f"error: {error}", err=True)
        return 3
    books = Bookkeeper(run)
    books.account()
    lost = books.lost_parts()
    if as_json:
        echo_json({**account_json(run, account), "lost_parts": lost})
    elif not quiet:
        questions = f"{account.written:,} of {account.planned:,} questions"
        echo(f"{questions} written into {amount(account.parts_published, 'part')}: {run.location}")
    if account.failed:
        print_failures(run, account)
    if lost:
        print_lost(lost)
        return 4
    return 1 if account.failed else 0


def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the demo's files go.")] = Path("demo-output"),
    questions: Annotated[int, typer.Option(min=1, help="How many questions of easy-vqa's test split.")] = 2000,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the main job on real questions about real images with a small trained model, and show its answers.

    Example: producer demo --questions 50
    """
    from producer.demo.demo import plan_demo, show_demo
    from producer.resuming import Resumption

    resumption = Resumption.of(output_dir)
    run = plan_demo(output_dir, questions)
    code = run_to_end(run, resumption, output_dir / "model_cache", quiet=quiet, as_json=as_json)
    if code == 0 and not (quiet or as_json):
        show_demo(run)
    raise SystemExit(code)
