"""Feeding: put a run's unfinished questions into the queue, a bounded number at a time.

`feed` is idempotent. The command line calls it once and every sweep of the collector again, so that a killed producer, a
lost message and a wiped Redis are one case. What was fed is noted in the same Redis as the messages: a wipe forgets both.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from kombu.exceptions import OperationalError
from redis.exceptions import LockNotOwnedError, RedisError
from redis.lock import Lock

from storage.plan import Slice
from storage.run import Run
from workers.broker import trouble
from workers.celery import app
from workers.foreign import is_strange_lock
from workers.message import MAX_NAME
from workers.queues import COLLECT, EXTRACT, ModelQueues, declaration
from workers.settings import settings

logger = logging.getLogger(__name__)
_CHUNK = 500  # messages in one round trip to Redis
# A feeder holds it for as long again with each chunk; one that is killed delays the others by no more.
_LOCK_SECONDS = 15
_GRACE = (
    15.0,
    60.0,
)  # seconds beyond the visibility timeout before a silent slice is fed again: as many more, within these
_HINT_INTERVAL = 1.0
_MAX_REPR = 1024  # characters of a message's arguments that Flower shows

_hinted: dict[tuple[str, int], float] = {}
_hint_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Fed:
    """How far a slice is fed. Times are Redis's own clock."""

    upto: int = 0  # questions below this sequence were put into the queue
    finished: int = 0  # questions staged when last looked at
    moved: float = 0.0  # when `upto` or `finished` last grew


def queues_of(run: Run) -> ModelQueues:
    """Return the queues that serve a run's model."""
    return ModelQueues(run.settings.model_slug, run.settings.dtype, run.settings.model_digest)


def feed(run: Run, published: set[int] | None = None, *, put: Callable[[int], object] = lambda _: None) -> int:
    """Put unfinished questions into the queue up to the run's bound. Return how many were put. One process at a time.

    `put` is told how many have been put so far.
    Of a cancelled run it puts none, and forgets what was fed: what is in the queue will be dropped.
    """
    if run.is_cancelled():
        forget(run)
        return 0
    published = run.parts_with_sidecar() if published is None else published
    pieces = [piece for piece in run.slices if piece.part not in published]
    # Else a collector that lags would leave staging to fill the disk.
    pieces = pieces[: settings().staging_limit or None]
    with redis_client() as client:
        lock = client.lock(f"halp:feeding:{run.run_id}", timeout=_LOCK_SECONDS, blocking=False)
        if not lock.acquire() and not _take_from_stranger(client, lock):
            return 0
        try:
            return _Feeder(run, client, lock, pieces, max(published, default=0)).feed(put)
        finally:
            with suppress(LockNotOwnedError):
                lock.release()


def _take_from_stranger(client: Any, lock: Lock) -> bool:
    """Acquire a lock that somebody holds for longer than we ever do; tell whether that was so."""
    if not is_strange_lock(client, lock.name, _LOCK_SECONDS):
        return False
    logger.error("removing %s: it is no lock of ours, since it does not end after %d s", lock.name, _LOCK_SECONDS)
    client.delete(lock.name)
    return bool(lock.acquire())


def forget(run: Run) -> None:
    """Forget what of a run was fed, so that its unfinished questions are fed again."""
    with redis_client() as client:
        client.delete(_key(run))


def wipe(run: Run) -> None:
    """Empty a Redis that serves this run alone, and feed it again: nothing waits for a dead worker's messages to return."""
    run.refresh()
    with redis_client() as client:
        client.flushdb()
    feed(run)


def queue_lengths(run: Run) -> dict[str, int]:
    """Return how many questions wait in the queues of a run's model, whosever they are: in the lanes, and to be retried."""
    queues = queues_of(run)
    with redis_client() as client:
        pipeline = client.pipeline(transaction=False)
        for name in (queues.retry, *queues.lanes):
            pipeline.llen(name)
        # A key of another type holds no question; `producer status` names it.
        found = pipeline.execute(raise_on_error=False)
        retried, *lanes = (number if isinstance(number, int) else 0 for number in found)
    return {queues.retry: retried, f"{queues.retry.removesuffix('.retry')}.lanes": sum(lanes)}


def hint_collector(run: Run, part: int) -> None:
    """Ask the collector to look at a run when a slice seems complete; its own sweeps do not depend on it."""
    now = time.monotonic()
    with _hint_lock:
        if now - _hinted.get((run.run_id, part), 0.0) < _HINT_INTERVAL:
            return
        _hinted[run.run_id, part] = now
    if len(run.staged(part)) >= run.slice(part).size:
        message = {"run_dir": run.location, "run_id": run.run_id}
        with suppress(OperationalError):  # the question is staged; a broker that is away must not fail its task
            app.send_task("workers.collect", kwargs=message, queue=declaration(COLLECT))


class _Feeder:
    """One pass over a run's open slices."""

    def __init__(self, run: Run, client: Any, lock: Lock, pieces: list[Slice], last_published: int) -> None:
        self._run = run
        self._client = client
        self._lock = lock
        self._pieces = pieces
        self._last_published = last_published
        self._queues = queues_of(run)
        self._now = _clock(client)

    def feed(self, put: Callable[[int], object]) -> int:
        if (fed := self._progress()) is None:
            return 0
        limit = settings().queue_limit or float("inf")
        in_queue = sum(entry.upto - entry.finished for entry in fed.values())
        number = 0
        for piece in self._pieces:
            entry = fed.get(piece.part, _Fed())
            staged = self._run.staged(piece.part) if entry.upto < piece.size else {}
            while entry.upto < piece.size and in_queue < limit:
                if not self._holds_lock():
                    return number
                end = int(min(piece.size, entry.upto + _CHUNK, entry.upto + limit - in_queue))
                missing = [sequence for sequence in range(entry.upto, end) if sequence not in staged]
                self._publish(piece, missing)
                entry = replace(entry, upto=end, finished=sum(s < end for s in staged), moved=self._now)
                self._note(piece.part, entry)
                in_queue += len(missing)
                number += len(missing)
                put(number)
            if in_queue >= limit:
                break
        return number

    def _holds_lock(self) -> bool:
        """Hold the lock for longer; tell whether that was possible. A frozen process may find it with another."""
        try:
            return bool(self._lock.reacquire())
        except LockNotOwnedError:
            return False

    def _progress(self) -> dict[int, _Fed] | None:
        """Return what is fed of the open slices, brought up to date; a stalled slice is left out, to be fed again.

        None where the lock is lost meanwhile: another feeder is at work.
        """
        noted = {int(part): _Fed(**json.loads(entry)) for part, entry in self._client.hgetall(_key(self._run)).items()}
        open_parts = {piece.part for piece in self._pieces}
        fed: dict[int, _Fed] = {}
        for part, last in noted.items():
            if part not in open_parts:
                self._client.hdel(_key(self._run), part)
                continue
            staged = sum(sequence < last.upto for sequence in self._run.staged(part))
            if not self._holds_lock():  # a thousand slices in an object store take minutes to list
                return None
            entry = last if staged == last.finished else replace(last, finished=staged, moved=self._now)
            if entry is not last:
                self._note(part, entry)
            lost = staged < last.finished and not self._run.store.exists(self._run.sidecar_key(part))
            if lost or self._stalled(part, entry):
                why = "lost staged questions" if lost else "made no progress"
                logger.warning("%s: part %d %s; feeding it again", self._run.location, part, why)
                self._client.hdel(_key(self._run), part)
                continue
            fed[part] = entry
        return fed

    def _stalled(self, part: int, entry: _Fed) -> bool:
        """Tell whether a slice's messages seem lost: long silence, and no longer queue before them that would explain it."""
        timeout = settings().visibility_timeout
        silent = self._now - entry.moved > timeout + min(max(timeout, _GRACE[0]), _GRACE[1])
        overtaken = part < self._last_published
        return silent and entry.finished < entry.upto and (overtaken or self._queues_are_empty())

    def _queues_are_empty(self) -> bool:
        return not any(map(self._client.llen, (self._queues.retry, *self._queues.lanes)))

    def _publish(self, piece: Slice, sequences: list[int]) -> None:
        questions = self._run.questions(piece.part)
        common = {"run_dir": self._run.location, "run_id": self._run.run_id, "part": piece.part}
        with app.producer_pool.acquire(block=True) as producer, producer.batch():
            for sequence in sequences:
                question = questions[sequence]
                names = {"question_id": question.question_id, "image_id": question.image_id[:MAX_NAME]}
                arguments = {**common, "sequence": sequence, **names}
                app.send_task(
                    EXTRACT,
                    kwargs=arguments,
                    argsrepr="()",
                    kwargsrepr=str(arguments)[:_MAX_REPR],  # Celery's own takes a third of the time of feeding
                    task_id=f"{self._run.run_id}-{self._run.label(piece.part)}-{sequence}",
                    queue=declaration(self._queues.lane(self._run.run_id, question.image_id)),
                    producer=producer,
                    declare=(),  # a lane is a Redis list: nothing to declare, and that took a fifth of the time
                    retry=False,  # the batch is sent as a whole later; here it would only wrap each message
                )

    def _note(self, part: int, entry: _Fed) -> None:
        self._client.hset(_key(self._run), part, json.dumps(asdict(entry)))


def _key(run: Run) -> str:
    return f"halp:fed:{run.run_id}"


def _clock(client: Any) -> float:
    seconds, microseconds = client.time()
    return float(seconds) + float(microseconds) / 1e6


@contextmanager
def redis_client() -> Iterator[Any]:
    """Yield a Redis client with the broker connection's own address, credentials and TLS settings."""
    with app.pool.acquire(block=True) as connection:
        # Else the first use tries for ever: whoever feeds has a person or another sweep behind it.
        connection.ensure_connection(max_retries=2, interval_start=0.2, interval_step=0.5)
        yield connection.default_channel.client


def broker_trouble() -> str | None:
    """Return what is wrong with the broker, in words; None where it answers and has room."""
    address = app.connection_for_write().as_uri()
    try:
        with redis_client() as client:
            memory = client.info("memory")
    except (OperationalError, RedisError, OSError) as error:
        return f"{address} {trouble(error)}"
    if 0 < memory["maxmemory"] <= memory["used_memory"]:
        return f"{address} {trouble(OperationalError('OOM'))}"
    return None
