"""The way of a question, on one page: extract it, stage it, collect its slice.

A task may run twice, or on two workers at once: it begins by looking whether its question is finished, staging keeps the
first result, and a published part is never touched again. Whatever goes wrong with a question ends in a staged failure or in
a retry.
"""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from celery import Task
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from storage.errors import DamagedError, ReplacedError
from storage.runs.run import Run
from storage.sample import Failure
from workers.current import current_collector, current_extractor
from workers.errors import (
    BatchFailedError,
    EngineStartError,
    MessageRefusedError,
    NotThereYetError,
    PermanentError,
    RunRefusedError,
    RunWaitsError,
    TransientError,
    WorkerEndsError,
    in_a_line,
)
from workers.extract import attempts, retried
from workers.extract.extractor import open_run_in_roots
from workers.extract.patience import goes_on, note_refusal, retry_write
from workers.monitor.metrics import count_unbegun
from workers.monitor.troubles import troubles
from workers.queue.app import app, model_queues
from workers.queue.feed import notify_collector
from workers.queue.message import QuestionMessage, RunMessage
from workers.queue.queues import EXTRACT, declaration
from workers.settings import settings

logger = logging.getLogger(__name__)
MAX_COUNTDOWN = 60  # seconds; a countdown above the visibility timeout would multiply the task
MAX_DISK_RETRIES = 3  # of a question whose run cannot be read or written; then the collector queues it again
PUT_OFF = "put off"  # how a task ends whose run cannot be read or written now
MAX_PASSES = 20  # of a question from a worker that refuses its run, or does not see it yet: for five minutes or so
_LONGEST_PASS = 30.0  # seconds
_EXPECTED = (MessageRefusedError,)  # Celery logs these in a line, without a traceback
# What leaves a task in Celery's threads pool without an acknowledgement, and costs the worker a thread for good.
_ESCAPING = (MemoryError, SystemExit, KeyboardInterrupt)
_REASONS: dict[type[Exception], str] = {TransientError: "transient_error", BatchFailedError: "engine_error"}


@app.task(bind=True, name=EXTRACT, max_retries=None, throws=_EXPECTED)  # type: ignore[untyped-decorator]
def extract(self: Task, *_: Any, **arguments: Any) -> str:
    """Compute one question and stage its result, or its failure."""
    message = QuestionMessage.decode(arguments)
    if not troubles.may_try(message.run_dir):
        raise _dropped(self, PUT_OFF)
    try:
        return _extract(self, message)
    except RunWaitsError:
        raise _dropped(self, PUT_OFF) from None
    except ReplacedError as error:  # the run was removed or moved: the next attempt sees what is there by then
        raise _pass_on(self, error) from error
    except DamagedError as error:  # of a file of the run that nobody can compute again: the other slices go on
        troubles.note(message.run_dir, f"waits: {error}", pause=False)
        raise _dropped(self, PUT_OFF) from None
    except OSError as error:  # not the question's fault, however long it lasts
        note_refusal(error, message.run_dir)
        if self.request.retries >= MAX_DISK_RETRIES:  # what waits for its time to come takes room from other runs
            raise _dropped(self, PUT_OFF) from None
        raise _retry(self, error) from error
    except _ESCAPING as error:
        raise _retry(self, _harmless(error)) from error


def _extract(self: Task, message: QuestionMessage) -> str:
    part, sequence = message.part, message.sequence
    extractor = current_extractor()
    opened = _open_run(self, extractor, message)
    run = opened.run
    if run.has_finished(part, sequence):
        return "finished before"
    if run.is_cancelled():
        raise _dropped(self, "cancelled")
    _check_planned(self, run, part, sequence)
    try:
        sample = extractor.extract(opened, part, sequence)
    except PermanentError as error:
        _fail(self, run, part, sequence, error.reason, error.message)
        raise
    except EngineStartError as error:  # not the question's fault: another worker takes it while this one ends
        raise Reject(error, requeue=True) from error
    except (OSError, ReplacedError, DamagedError):  # of the run directory: what concerns an image is a TransientError
        raise
    except (Exception, *_ESCAPING) as caught:  # the task boundary: whatever else happened is tried again, then recorded
        failure = _harmless(caught)
        reason, most = _REASONS.get(type(failure), "internal_error"), settings().max_retries
        if self.request.retries >= most:
            _fail(self, run, part, sequence, reason, f"{type(caught).__name__}: {caught}")
            raise failure from failure.__cause__
        why = attempts.note(run.run_id, self.request.retries + 1, most + 1, f"{reason}: {in_a_line(caught)}")
        retried.failed(run, part, sequence, self.request.hostname or "", why)
        raise _retry(self, failure) from caught
    _keep(run, lambda: run.stage_sample(part, sequence, sample))
    retried.ended(run, part, sequence)
    notify_collector(run, part)
    return "written"


@app.task(name="workers.collect", throws=_EXPECTED)  # type: ignore[untyped-decorator]
def collect(*_: Any, **arguments: Any) -> str:
    """Bring a run forward: pack its complete slices, feed what is missing, summarise it at its end."""
    message = RunMessage.decode(arguments)
    try:
        run = open_run_in_roots(message.run_dir, message.run_id, settings().data_roots)
        if not troubles.may_try(run.location):
            return PUT_OFF
        return "finished" if current_collector().bring_forward(run) else "not finished yet"
    except (OSError, DamagedError) as error:  # the sweep says so
        return f"{PUT_OFF}: {error}"
    except ReplacedError as error:
        raise MessageRefusedError(str(error)) from error
    except _ESCAPING as error:
        raise _harmless(error) from error


def _open_run(task: Task, extractor: Any, message: QuestionMessage) -> Any:
    try:
        return retry_write(lambda: extractor.open_run(message.run_dir, message.run_id), message.run_dir, message.run_id)
    except RunRefusedError as error:
        logger.error("refusing %s: %s", message.run_dir, error)
        raise _pass_on(task, error) from error
    except WorkerEndsError as error:
        raise Reject(error, requeue=True) from error
    except TransientError as error:  # the directory is not there, or not yet: nothing can be recorded in it
        troubles.note(message.run_dir, f"waits: {error}", pause=False)
        raise _pass_on(task, error) from error


def _check_planned(task: Task, run: Run, part: int, sequence: int) -> None:
    """Refuse a question that the plan has not. A part of which nothing is seen may have been planned a moment ago."""
    try:
        size = len(run.questions(part))
    except KeyError as error:
        raise _pass_on(task, NotThereYetError(f"{run.location} has no part {part}, or not yet")) from error
    if sequence >= size:
        raise MessageRefusedError(f"{run.location} has no question {sequence} in part {part}")


def _keep(run: Run, write: Callable[[], None]) -> None:
    """Stage something, however long the disk refuses; when the worker ends meanwhile the question goes back."""
    try:
        retry_write(write, run.location, run.run_id)
        goes_on(run.location, run.run_id)
    except WorkerEndsError as error:
        raise Reject(error, requeue=True) from error


def _dropped(task: Task, why: str) -> Exception:
    """Drop a question that is not begun: it is neither done nor failed. In Flower it is REVOKED.

    Of a `Reject` Celery 5.7 tells Flower a failure, and logs a traceback each (https://github.com/celery/celery/issues/4222).
    Of an `Ignore` it tells nothing.
    """
    count_unbegun("dropped")
    if task.request.id is not None:  # as of whoever calls it directly
        with suppress(OperationalError, RedisError, OSError):  # the question is dropped, whether or not that is seen
            task.send_event("task-revoked", retry=False, terminated=False, signum=None, expired=False)
    ignored: Exception = Ignore(why)  # acknowledged, and said in one line
    return ignored


def _pass_on(task: Task, error: Exception) -> Exception:
    """Put off a question of which this worker can compute nothing, and offer it to others: again and again, for some minutes.

    It counts as no attempt. A question whose last offer fails is dropped; the collector of its run queues it again.

    Where this worker and another wait for questions it is this one that gets it every second time, so the first pauses are
    short: 40 questions went over in 143 s with pauses of 15 to 30 s, in 41 s with these.
    """
    passed = task.request.get("halp_passed")
    passed = passed if type(passed) is int else 0
    if passed < MAX_PASSES:
        count_unbegun("refused" if isinstance(error, RunRefusedError) else "passed_on")
        app.send_task(
            EXTRACT, kwargs=task.request.kwargs, task_id=task.request.id, retries=task.request.retries,
            countdown=min(_LONGEST_PASS, settings().visibility_timeout / 2, 1.5**passed) * random.uniform(0.5, 1.0),
            queue=declaration(model_queues(settings()).retry), headers={"halp_passed": passed + 1},
        )  # fmt: skip
    else:
        logger.warning("no longer offering %s: %s", task.request.id, error)
        return _dropped(task, str(error))
    ignored: Exception = Ignore(str(error))  # acknowledged, and said in one line: the reason stands above it
    return ignored


def _harmless(error: BaseException) -> Exception:
    """Return an error that Celery handles as one: itself, or a transient one in place of what would escape."""
    if isinstance(error, Exception) and not isinstance(error, MemoryError):
        return error
    harmless = TransientError(f"{type(error).__name__}: {error}")
    harmless.__cause__ = error
    return harmless


def _retry(task: Task, error: Exception) -> Exception:
    """Put the task into the retry queue with exponential back-off and jitter."""
    countdown = min(MAX_COUNTDOWN, 2 ** min(task.request.retries, 6)) * random.uniform(0.5, 1.0)
    retry: Exception = task.retry(
        exc=error, countdown=countdown, queue=declaration(model_queues(settings()).retry), throw=False
    )
    return retry


def _fail(task: Task, run: Run, part: int, sequence: int, reason: str, message: str) -> None:
    """Stage a failure: the record of why a question has no sample."""
    failure = Failure(
        question_id=run.questions(part)[sequence].question_id,
        reason=reason,
        message=message,
        traceback=traceback.format_exc(),
        attempts=task.request.retries + 1,
        worker=task.request.hostname or "",
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _keep(run, lambda: run.stage_failure(part, sequence, failure))
    retried.ended(run, part, sequence)
    notify_collector(run, part)
