"""Feeding: put a run's unfinished questions into the queue, a bounded number at a time.

`feed` is idempotent. The command line calls it once and every sweep of the collector again, so that a killed producer, a
lost message and a wiped Redis are one case. What was fed is noted in the same Redis as the messages: a wipe forgets both.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kombu.exceptions import OperationalError
from redis.exceptions import LockNotOwnedError, RedisError
from redis.lock import Lock

from storage.errors import DamagedError
from storage.runs.plan import Slice
from storage.runs.run import Run
from workers.queue.app import app
from workers.queue.broker import trouble
from workers.queue.foreign import is_strange_lock
from workers.queue.home import claim
from workers.queue.message import MAX_NAME
from workers.queue.notes import Fed, Notes
from workers.queue.queues import COLLECT, EXTRACT, ModelQueues, declaration
from workers.queue.waiting import waiting
from workers.settings import settings

logger = logging.getLogger(__name__)
_CHUNK = 500  # messages in one round trip to Redis
# A feeder holds it for as long again with each chunk; one that is killed delays the others by no more.
_LOCK_SECONDS = 15
_GRACE = (
    15.0,
    60.0,
)  # seconds beyond the visibility timeout before a silent slice is looked at: as many more, within these
_HINT_INTERVAL = 1.0
_MAX_REPR = 1024  # characters of a message's arguments that Flower shows

_hinted: dict[tuple[str, int], float] = {}
_hint_lock = threading.Lock()


def queues_of(run: Run) -> ModelQueues:
    """Return the queues that serve a run's model."""
    return ModelQueues(run.settings.model_slug, run.settings.dtype, run.settings.model_digest)


def feed(run: Run, published: set[int] | None = None, *, put: Callable[[int], object] = lambda _: None) -> int:
    """Put unfinished questions into the queue up to the run's bound. Return how many were put. One process at a time.

    `put` is told how many have been put so far.
    Of a cancelled run it puts none, and forgets what was fed: what is in the queue will be dropped.
    Raises CopyError where the run is fed from elsewhere; DamagedError where a slice cannot be read, when the others are fed.
    """
    if run.settings.merged:  # its questions were computed in other runs: what is gone is merged again
        return 0
    cancelled = run.is_cancelled()
    published = run.parts_with_sidecar() if published is None else published
    pieces = [piece for piece in run.slices if piece.part not in published]
    # Else a collector that lags would leave staging to fill the disk.
    pieces = pieces[: settings().staging_limit or None]
    with redis_client() as client:
        lock = client.lock(f"halp:feeding:{run.run_id}", timeout=_LOCK_SECONDS, blocking=False)
        if not lock.acquire() and not _take_from_stranger(client, lock):
            return 0
        try:
            moved = claim(client, run)
            if cancelled:
                Notes(client, run.run_id).clear_progress()
                return 0
            return _Feeder(run, client, lock, pieces).feed(put, look=moved)
        finally:
            with suppress(LockNotOwnedError):
                lock.release()


def _take_from_stranger(client: Any, lock: Lock) -> bool:
    """Acquire a lock that lasts longer than ours ever do, and tell whether that was so.

    A stranger's has no end. One of ours may seem so after the server's clock was set back; then its holder stops.
    """
    if not is_strange_lock(client, lock.name, _LOCK_SECONDS):
        return False
    logger.error("removing %s: it is no lock of ours, since it does not end after %d s", lock.name, _LOCK_SECONDS)
    client.delete(lock.name)
    return bool(lock.acquire())


def reset(run: Run) -> None:
    """Forget what of a run was fed, so that its unfinished questions are fed again."""
    with redis_client() as client:
        Notes(client, run.run_id).clear_progress()


def look_again(run_id: str) -> None:
    """Have the next feeder look which questions of a run have no message, and feed them: some were dropped."""
    with suppress(OperationalError, RedisError, OSError), redis_client() as client:
        Notes(client, run_id).ask_to_look()


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


def notify_collector(run: Run, part: int) -> None:
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

    def __init__(self, run: Run, client: Any, lock: Lock, pieces: list[Slice]) -> None:
        self._run = run
        self._client = client
        self._lock = lock
        self._pieces = {piece.part: piece for piece in pieces}
        self._queues = queues_of(run)
        self._notes = Notes(client, run.run_id)
        self._suspects: set[int] = set()  # parts of which a message seems to be lost
        self._damaged: DamagedError | None = None
        # Of a task's id that comes again, as after `cancel`, Celery and Flower keep the earlier end.
        self._feeding = secrets.token_hex(3)

    def feed(self, put: Callable[[int], object], *, look: bool) -> int:
        """Put questions into the queue; `look`: whatever was fed may have lost its message."""
        look = self._notes.is_asked_to_look() or look
        if (fed := self._progress(look=look)) is None or (number := self._feed_lost(fed)) is None:
            return 0
        limit = settings().queue_limit or float("inf")
        in_queue = sum(entry.upto - entry.finished for entry in fed.values())
        for piece in self._pieces.values():
            entry = fed.get(piece.part, Fed())
            staged = self._run.staged(piece.part) if entry.upto < piece.size else {}
            while entry.upto < piece.size and in_queue < limit and self._is_readable(piece):
                if not self._holds_lock():
                    return number
                end = int(min(piece.size, entry.upto + _CHUNK, entry.upto + limit - in_queue))
                missing = [sequence for sequence in range(entry.upto, end) if sequence not in staged]
                self._publish(piece, missing)
                entry = Fed(end, sum(s < end for s in staged))
                self._notes.write(piece.part, entry)
                in_queue += len(missing)
                number += len(missing)
                put(number)
            if in_queue >= limit:
                break
        if self._damaged is not None:
            raise self._damaged
        return number

    def _holds_lock(self) -> bool:
        """Hold the lock for longer; tell whether that was possible. A frozen process may find it with another."""
        try:
            return bool(self._lock.reacquire())
        except LockNotOwnedError:
            return False

    def _is_readable(self, piece: Slice) -> bool:
        """Tell whether a slice's questions can be read; where they cannot, the others are fed all the same."""
        try:
            self._run.questions(piece.part)
        except FileNotFoundError:
            self._damaged = DamagedError(f"{self._run.store.address(piece.key)}, a slice of the plan, is gone")
        except DamagedError as error:
            self._damaged = error
        else:
            return True
        return False

    def _progress(self, *, look: bool) -> dict[int, Fed] | None:
        """Return how far the open slices are fed, brought up to date. None where another feeder has taken the lock."""
        timeout = settings().visibility_timeout
        longest = timeout + min(max(timeout, _GRACE[0]), _GRACE[1])
        fed: dict[int, Fed] = {}
        for part, last in self._notes.read(self._pieces).items():
            staged = sum(sequence < last.upto for sequence in self._run.staged(part))
            if not self._holds_lock():  # a thousand slices in an object store take minutes to list
                return None
            entry = fed[part] = Fed(last.upto, staged)
            if entry != last:
                self._notes.write(part, entry)
            # Fewer are staged where a damaged file was removed.
            if look or staged < last.finished or self._notes.silence(part, entry) > longest:
                self._suspects.add(part)
        return fed

    def _feed_lost(self, fed: dict[int, Fed]) -> int | None:
        """Feed again what is neither staged nor in the queue of the slices in doubt; return how many. None as above.

        A run that waits behind others, or for a worker, is silent too: therefore its messages are looked for.
        """
        missing: dict[int, set[int]] = {}
        for part in self._suspects:
            if fed[part].finished < fed[part].upto and self._is_readable(self._pieces[part]):
                missing[part] = set(range(fed[part].upto)) - self._run.staged(part).keys()
        if not missing:
            return 0
        found = waiting(self._client, self._run, self._queues, missing, self._holds_lock)
        if found is None:
            return None
        number = 0
        for part, sequences in missing.items():
            self._notes.break_silence(part, fed[part])
            staged = self._run.staged(part)  # again: what was with a worker then may be finished now
            lost = sorted(s for s in sequences if (part, s) not in found and s not in staged)
            if not lost or self._run.store.exists(self._run.sidecar_key(part)):
                continue
            logger.warning("%s: part %d lost %d messages; feeding them again", self._run.location, part, len(lost))
            for start in range(0, len(lost), _CHUNK):
                if not self._holds_lock():
                    return None
                self._publish(self._pieces[part], lost[start : start + _CHUNK])
            number += len(lost)
        return number

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
                    task_id=f"{self._run.run_id}-{self._run.label(piece.part)}-{sequence}-{self._feeding}",
                    queue=declaration(self._queues.lane(self._run.run_id, question.lane_key)),
                    producer=producer,
                    declare=(),  # a lane is a Redis list: nothing to declare, and that took a fifth of the time
                    retry=False,  # the batch is sent as a whole later; here it would only wrap each message
                )


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


def broker_memory() -> dict[str, int]:
    """Return the bytes that the broker has `used`, and its `limit` where it says one: maxmemory, or its machine's memory."""
    with redis_client() as client:
        memory = client.info("memory")
    limit = memory["maxmemory"] or memory.get("total_system_memory", 0)
    return {"used": memory["used_memory"]} | ({"limit": limit} if limit else {})
