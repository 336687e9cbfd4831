"""Putting a run's questions into the queue, and taking them out: `enqueue`, `retry`, `cancel`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Annotated

import typer

from producer.commands.common import AsJson, Directory, Quiet, print_hints, print_lost
from producer.options import RunOptions, with_run_options
from storage.errors import UserError
from storage.screen.console import Console
from storage.screen.terminal import amount, echo, echo_json


@with_run_options
def enqueue(options: RunOptions, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check a dataset, plan a run over it and put its questions into the queue. Again: finish what is missing.

    Exit code 4: a published part is gone or cut.

    Example: producer enqueue vqa.csv --images-dir images/ --output-dir output/
    """
    from producer.enqueueing import CancelledMeanwhileError, enqueue_run
    from producer.show.listeners import workers_kept_out
    from producer.show.progress import bars
    from workers.settings import settings

    try:
        with bars(Console(stderr=True, quiet=quiet or as_json)) as phases:
            done = enqueue_run(options, phases)
    except CancelledMeanwhileError as error:
        echo(f"{error}; the same command resumes it.", err=True)
        raise SystemExit(130) from None
    run, account, number, lost = done.run, done.account, done.number, done.lost_parts
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
        print_hints(Console(stderr=True), problems)
    if lost:
        print_lost(lost)
        raise SystemExit(4)


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

    from producer.enqueueing import unreachable
    from producer.retrying import plan_retry
    from storage.runs.run import Run
    from workers.queue.feed import feed

    run = Run.open(directory)
    planned = plan_retry(run, reason or [], question_id or [])
    try:
        number, problem = feed(run), None
    except (OperationalError, RedisError) as error:
        number, problem = 0, f"{unreachable(error)} Or start a collector that sees the run: it feeds it."
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
