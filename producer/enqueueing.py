"""Planning a run and putting its questions into the queue: what `enqueue` does."""

from __future__ import annotations

from dataclasses import dataclass

from producer.options import RunOptions
from producer.planning import plan_run
from producer.resuming import Resumption
from producer.show.progress import Phases
from storage.errors import UserError
from storage.runs.account import Account, Bookkeeper
from storage.runs.run import Run
from storage.runs.soundness import check_private_files


class CancelledMeanwhileError(Exception):
    """The run was cancelled while it was planned: nothing is put into the queue."""


@dataclass(frozen=True, slots=True)
class Enqueued:
    """A run whose questions are in the queue."""

    run: Run
    account: Account
    number: int  # of questions that were put into the queue now
    lost_parts: list[str]


def enqueue_run(options: RunOptions, phases: Phases) -> Enqueued:
    """Plan a run, or open it where it was begun, and feed the queue. Raises UserError, CancelledMeanwhileError."""
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from workers.queue.feed import feed, reset
    from workers.settings import settings

    resumption = Resumption.of(options.output_dir)
    run = plan_run(options, phases)
    try:
        books = Bookkeeper(run)
        account = books.account()
        if not account.finished:
            check_private_files(run)
        if resumption.found is not None and run.cancellation() == resumption.found:
            reset(run)  # what was in the queue has been dropped
        if not resumption.take_back(run):
            raise CancelledMeanwhileError(f"{run.location} was cancelled while this command was at work")
        room = settings().queue_limit or account.outstanding
        put = phases("filling the queue", min(room, account.outstanding))
        number = 0 if account.finished else feed(run, put=put)
        return Enqueued(run, account, number, books.lost_parts())
    except (OperationalError, RedisError) as error:
        again = "the same command feeds it, and so does a collector that sees it"
        raise UserError(f"{unreachable(error)} The run is planned in {run.location}; {again}.") from None


def unreachable(error: Exception) -> str:
    """Return why the broker cannot be used, and what to do."""
    from workers.queue.app import app as celery_app
    from workers.queue.broker import trouble

    broker, what = celery_app.connection_for_write().as_uri(), trouble(error)
    if "does not answer" not in what:
        return f"the broker {broker} {what}."
    return f"cannot reach the broker {broker}: it {what}\nStart it (`redis-server`) or set HALP_BROKER_URL."
