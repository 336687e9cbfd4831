"""`producer`: plan runs, feed them, show how far they are, or do everything on this machine."""

from __future__ import annotations

import os
import shlex
import signal
import time
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from producer.options import RunOptions, with_run_options
from storage.command import Version, run_command
from storage.errors import UserError
from storage.screen.console import Console
from storage.screen.terminal import amount, echo, echo_json, one_line

if TYPE_CHECKING:
    from producer.resuming import Resumption
    from storage.runs.account import Account
    from storage.runs.run import Run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Plan a run over a VQA dataset, queue it for the workers, and see how far it is.",
)
_WATCH_INTERVAL = 1.0
_LISTENERS_INTERVAL = 10.0

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


@app.callback()
def _every_command(version: Version = False) -> None:
    pass


@app.command()
@with_run_options
def enqueue(options: RunOptions, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check a dataset, plan a run over it and put its questions into the queue. Again: finish what is missing.

    Exit code 4: a published part is gone or cut.

    Example: producer enqueue vqa.csv --images-dir images/ --output-dir output/
    """
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from producer.planning import plan_run
    from producer.resuming import Resumption
    from producer.show.listeners import workers_kept_out
    from producer.show.progress import bars
    from storage.runs.account import Bookkeeper
    from storage.runs.soundness import check_private_files
    from workers.queue.feed import feed, reset
    from workers.settings import settings

    resumption = Resumption.of(options.output_dir)
    try:
        with bars(Console(stderr=True, quiet=quiet or as_json)) as phases:
            run = plan_run(options, phases)
            books = Bookkeeper(run)
            account = books.account()
            if not account.finished:
                check_private_files(run)
            if resumption.found is not None and run.cancellation() == resumption.found:
                reset(run)  # what was in the queue has been dropped
            if not resumption.take_back(run):
                echo(
                    f"{run.location} was cancelled while this command was at work; the same command resumes it.",
                    err=True,
                )
                raise SystemExit(130)
            room = settings().queue_limit or account.outstanding
            put = phases("filling the queue", min(room, account.outstanding))
            number = 0 if account.finished else feed(run, put=put)
            lost = books.lost_parts()
    except (OperationalError, RedisError) as error:
        again = "the same command feeds it, and so does a collector that sees it"
        raise UserError(f"{_unreachable(error)} The run is planned in {run.location}; {again}.") from None
    problems = [] if account.finished else workers_kept_out(run)
    if as_json:
        from producer.show.display import account_json

        echo_json({**account_json(run, account), "queued": number, "lost_parts": lost, "problems": problems})
    elif not quiet:
        planned = f"{amount(account.planned, 'question')} in {amount(account.parts_planned, 'part')}"
        echo(f"{planned}; {number:,} put into the queue now.")
        bound, ahead = settings().queue_limit, settings().staging_limit
        if number and number < account.outstanding:
            most = f"{bound:,} in the queue at a time" if bound else f"{ahead:,} parts ahead of the first unpublished one"
            echo(f"The collector feeds the rest, at most {most}.")
        echo(f"Watch: {shlex.join(['producer', 'status', options.output_dir, '--watch'])}")
        _print_hints(Console(stderr=True), problems)
    if lost:
        _print_lost(lost)
        raise SystemExit(4)


@app.command()
@with_run_options
def run(
    options: RunOptions,
    cache_dir: CacheDir = None,
    max_retries: Annotated[
        int | None, typer.Option(min=0, help="Retries of a question after transient errors. [HALP_MAX_RETRIES]")
    ] = None,
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
    resumption = Resumption.of(options.output_dir)
    with bars(Console(stderr=True, quiet=quiet or as_json)) as phases:
        planned = plan_run(options, phases)
    model = named_model(options.model)
    raise SystemExit(run_to_end(planned, resumption, cache_dir, model=model, quiet=quiet, as_json=as_json))


def run_to_end(
    run: Run,
    resumption: Resumption,
    cache_dir: Path | None,
    *,
    model: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Run on this machine with a progress bar; print how it ended. Return the exit code.

    model: where the run's lies now; where it lay if None.
    """
    from producer.local.machine import RunStoppedError, run_locally
    from producer.show.display import account_json
    from producer.show.listeners import serving_workers
    from producer.show.live import LiveAccount
    from storage.runs.account import Bookkeeper

    console = Console(stderr=True, quiet=quiet or as_json)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with LiveAccount(console, run, lambda: serving_workers(run)) as live:
            account = run_locally(run, resumption, model=model or run.settings.model, cache_dir=cache_dir, show=live.show)
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
        _print_failures(run, account)
    if lost:
        _print_lost(lost)
        return 4
    return 1 if account.failed else 0


@app.command()
@partial(with_run_options, leave_out=("repair", "relocate"))
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


@app.command()
def status(
    directory: Directory,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay, with bars, rate, time left and workers, until the run ends.")
    ] = False,
    failed: Annotated[bool, typer.Option("--failed", help="List the failed questions instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Account for every planned question, from the files alone, and say if no worker serves the run.

    With --watch the exit code is that of `producer run`: 0, every question is written; 1, some failed; 4, a published part
    is gone or cut; 130, the run was cancelled.

    Example: producer status output/ --watch
    """
    from producer.show.display import account_json, account_table, workers_table
    from producer.show.listeners import listening_workers, serving_workers
    from producer.show.live import LiveAccount
    from storage.runs.account import Bookkeeper
    from storage.runs.run import Run

    run = Run.open(directory)
    if failed:
        _print_failed(run, as_json=as_json)
        return
    bookkeeper = Bookkeeper(run)
    account = bookkeeper.account()
    if watch:
        console = Console(stderr=True, quiet=as_json)
        looked = float("-inf")
        with LiveAccount(console, run, lambda: serving_workers(run)) as live:
            while not (account.finished or run.is_cancelled()):
                if time.monotonic() - looked > _LISTENERS_INTERVAL:
                    found = listening_workers(run)
                    note = [found.note] if found.note and looked < 0 else []
                    _print_hints(console, [*note, *found.problems])
                    looked = time.monotonic()
                live.show(account)
                time.sleep(_WATCH_INTERVAL)
                account = bookkeeper.account()
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
        _print_hints(Console(stderr=True), listeners.problems)
    _print_lost(lost)
    for worker, message in run.refusals().items():
        echo(one_line(f"refused by {worker}: {message}"), err=True)
    raise SystemExit(code)


@app.command()
def retry(
    directory: Directory,
    reason: Annotated[list[str] | None, typer.Option(metavar="CLASS", help="Only failures of this class; repeatable.")] = None,
    question_id: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Only this question; repeatable.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compute failed questions again, with the same settings: plan them in new parts and put them into the queue.

    Example: producer retry output/ --reason image_missing
    """
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from producer.retrying import plan_retry
    from storage.runs.run import Run
    from workers.queue.feed import feed

    run = Run.open(directory)
    planned = plan_retry(run, reason or [], question_id or [])
    try:
        number, problem = feed(run), None
    except (OperationalError, RedisError) as error:
        number, problem = 0, f"{_unreachable(error)} Or start a collector that sees the run: it feeds it."
    if as_json:
        echo_json({**asdict(planned), "queued": number, "problem": problem})
    elif not quiet:
        parts = f"{planned.parts[0]} to {planned.parts[-1]}" if len(planned.parts) > 1 else f"{planned.parts[0]}"
        noun = "question is" if planned.questions == 1 else "questions are"
        echo(f"{planned.questions:,} failed {noun} planned again in part {parts}; {number:,} put into the queue now.")
        if planned.staged:
            echo(f"{planned.staged:,} more failed, but their parts are not published yet: retry them later.")
        echo(f"Watch: {shlex.join(['producer', 'status', directory, '--watch'])}")
        echo("On one machine, the `producer run` command that the run was begun with computes them.")
    if problem and not as_json:
        echo(problem, err=True)


@app.command()
def cancel(directory: Directory, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Stop a run: workers drop its queued questions and begin no other. What is finished is kept; other runs go on.

    Example: producer cancel output/
    """
    from storage.runs.account import Bookkeeper
    from storage.runs.run import Run
    from storage.stores.space import describe

    run = Run.open(directory)
    account = Bookkeeper(run).account()
    if account.finished:
        raise UserError(f"{run.location} is finished: there is nothing to cancel")
    try:
        newly = run.cancel()
    except OSError as error:
        if not run.is_cancelled():
            raise UserError(f"cannot cancel: {describe(error, run.location)}; the run goes on") from None
        newly = False
    if as_json:
        echo_json({"newly_cancelled": newly, "outstanding": account.outstanding})
    elif not quiet:
        was = "is cancelled" if newly else "was cancelled before"
        echo(f"{run.location} {was}; {account.outstanding:,} questions are outstanding.")
        echo("The command that it was begun with (`producer enqueue` or `producer run`) resumes it.")


@app.command()
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


def _print_failures(run: Run, account: Account) -> None:
    from storage.runs.failures import published_failures

    echo(f"{account.failed:,} failed; all of them are in {run.store.address('failures.csv')}:", err=True)
    for failed in islice(published_failures(run), 10):
        failure = failed.failure
        echo(one_line(f"  {failure.question_id}: {failure.reason}: {failure.message}"), err=True)
    if account.failed > 10:
        echo(f"  and {account.failed - 10:,} more", err=True)


def _print_lost(lost: list[str]) -> None:
    for sentence in lost[:10]:
        echo(one_line(sentence), err=True)
    if len(lost) > 10:
        echo(f"and {len(lost) - 10:,} more", err=True)
    if lost:
        echo("The command that the run was begun with computes them again with --repair.", err=True)


def _print_hints(console: Console, problems: list[str]) -> None:
    for problem in problems:
        console.print(one_line(problem), style="yellow", highlight=False, soft_wrap=True)


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


def _unreachable(error: Exception) -> str:
    from workers.queue.app import app as celery_app
    from workers.queue.broker import trouble

    broker, what = celery_app.connection_for_write().as_uri(), trouble(error)
    if "does not answer" not in what:
        return f"the broker {broker} {what}."
    return f"cannot reach the broker {broker}: it {what}\nStart it (`redis-server`) or set HALP_BROKER_URL."


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    run_command(app)


if __name__ == "__main__":
    main()
