"""Dynamic batching: task threads hand in single requests, one or two threads of their own run batches of them.

Batches are bounded by count and by tokens (questions times the longest one's), never mix groups (a group is a run), and keep
the questions of one image together. An exception in a batch halves it until the one bad request fails alone; where memory ran
out, later batches are smaller. When the engine dies, every request that was in flight runs alone; only a crash while it runs
alone counts against it. Where crashes are counted is the caller's business: `Crashes` of a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from storage.sample import Sample
from workers.engine.interface import Request
from workers.errors import BatchFailedError, EngineDiedError, EngineStartError, PermanentError

logger = logging.getLogger(__name__)
MAX_CRASHES_ALONE = 3


class Crashes(Protocol):
    """The crashes of the engine under one request."""

    @property
    def suspect(self) -> bool:
        """Whether it was in flight at one: then it runs alone from its start."""
        ...

    def note(self, error: EngineDiedError, *, alone: bool) -> int:
        """Record one. Return how many were with the request alone in the engine. An OSError fails the request."""
        ...


class CrashesInMemory:
    """Counts crashes as long as the request waits."""

    suspect = False

    def __init__(self) -> None:
        self._alone = 0

    def note(self, _: EngineDiedError, *, alone: bool) -> int:
        """Count a crash."""
        self._alone += alone
        return self._alone


@dataclass(slots=True)
class _Entry:
    group: Hashable
    request: Request
    crashes: Crashes
    future: Future[Sample] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class DynamicBatcher:
    """Forms batches of submitted requests and runs them in threads of its own.

    While one runs, `ahead` more are handed on once they are full; what is not full waits for its end, and grows.
    """

    def __init__(
        self,
        run_batch: Callable[[Sequence[Request]], list[Sample]],
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        max_queue_delay: float,
        on_fatal: Callable[[BaseException], None],
        ahead: int = 0,
    ) -> None:
        self._run_batch = run_batch
        self._max_size = max_batch_size
        self._max_tokens = max_batch_tokens
        self._max_delay = max_queue_delay
        self._on_fatal = on_fatal
        self._waiting: list[_Entry] = []
        self._changed = threading.Condition()
        self._closed = False
        self._fatal: BaseException | None = None
        self._running = 0
        self._threads = [threading.Thread(target=self._loop, name=f"batcher-{n}", daemon=True) for n in range(1 + ahead)]
        for thread in self._threads:
            thread.start()

    def submit(self, group: Hashable, request: Request, crashes: Crashes | None = None) -> Future[Sample]:
        """Hand in a request; its future gets the sample or the error. Raises EngineStartError once there is no engine."""
        entry = _Entry(group, request, crashes or CrashesInMemory())
        with self._changed:
            if self._fatal is not None or self._closed:
                raise EngineStartError(str(self._fatal or "the batcher is closed"))
            self._waiting.append(entry)
            self._changed.notify()
        return entry.future

    def close(self) -> None:
        """Run what waits, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _loop(self) -> None:
        batch: list[_Entry] = []
        try:
            while batch := self._next_batch():
                self._run(batch)
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()
        except BaseException as error:  # without these threads every task would wait for ever
            logger.exception("the batcher ends")
            with self._changed:
                first, self._fatal = self._fatal is None, error
                lost = batch + self._waiting
                self._waiting = []
                self._changed.notify_all()
            for entry in lost:
                if not entry.future.done():
                    entry.future.set_exception(EngineStartError(str(error)))
            if first:
                self._on_fatal(error)

    def _next_batch(self) -> list[_Entry]:
        """Wait for a full batch, or, where none is running, for the oldest request to have waited long enough.

        Empty when closed and done.
        """
        with self._changed:
            while True:
                if self._waiting:
                    batch, full = self._select()
                    remaining = self._waiting[0].arrived + self._max_delay - time.monotonic()
                    if full or self._closed or (remaining <= 0 and not self._running):
                        chosen = {id(entry) for entry in batch}
                        self._waiting = [entry for entry in self._waiting if id(entry) not in chosen]
                        self._running += 1
                        return batch
                    self._changed.wait(None if self._running else remaining)
                elif self._closed or self._fatal is not None:
                    return []
                else:
                    self._changed.wait()

    def _select(self) -> tuple[list[_Entry], bool]:
        """Choose a batch around the oldest request: its group, whole images in order of arrival. Tell whether it is full.

        A suspect is a full batch by itself.
        """
        if self._waiting[0].crashes.suspect:
            return self._waiting[:1], True
        group = self._waiting[0].group
        images: dict[str, list[_Entry]] = {}
        for entry in self._waiting:
            if entry.group == group and not entry.crashes.suspect:
                images.setdefault(entry.request.image_key, []).append(entry)
        batch: list[_Entry] = []
        longest, left_out = 0, False
        for entry in (e for entries in images.values() for e in entries):
            longer = max(longest, entry.request.weight)
            if batch and (len(batch) + 1) * longer > self._max_tokens:
                left_out = True  # a long one waits until it is the oldest
                continue
            batch.append(entry)
            longest = longer
            if len(batch) == self._max_size:
                return batch, True
        return batch, left_out

    def _run(self, batch: list[_Entry]) -> None:
        try:
            samples = self._run_batch([entry.request for entry in batch])
            if len(samples) != len(batch):
                raise BatchFailedError(f"the engine returned {len(samples)} samples for {len(batch)} questions", "")
        except EngineDiedError as error:
            logger.error("%s, with %d questions in flight", error, len(batch))
            self._after_death(batch, error)
        except BatchFailedError as error:
            if len(batch) == 1:
                batch[0].future.set_exception(_no_room(error) if error.out_of_memory else error)
                return
            logger.warning("a batch of %d failed (%s); halving it", len(batch), error)
            if error.out_of_memory:
                self._learn(batch)
            middle = len(batch) // 2
            self._run(batch[:middle])
            self._run(batch[middle:])
        else:
            for entry, sample in zip(batch, samples):
                entry.future.set_result(sample)

    def _learn(self, batch: Sequence[_Entry]) -> None:
        """Bound later batches to half of what had no room."""
        limit = len(batch) * max(entry.request.weight for entry in batch) // 2
        with self._changed:
            is_lower = limit < self._max_tokens
            self._max_tokens = min(limit, self._max_tokens)
        if is_lower:
            logger.warning("batches have at most %d tokens from now on: questions times the longest one's", limit)

    def _after_death(self, batch: list[_Entry], error: EngineDiedError) -> None:
        # All are noted before one runs again: the worker may not live to see its end.
        going_on = [entry for entry in batch if self._noted(entry, error, alone=len(batch) == 1)]
        for entry in going_on:
            self._run([entry])

    def _noted(self, entry: _Entry, error: EngineDiedError, *, alone: bool) -> bool:
        """Note a crash for one of its requests; tell whether it may be tried again now."""
        try:
            number = entry.crashes.note(error, alone=alone)
        except OSError as fault:  # a full disk: uncounted, it would run for ever
            entry.future.set_exception(fault)
            return False
        if number < MAX_CRASHES_ALONE:
            return True
        entry.future.set_exception(engine_crashed(f"{error}; that was death {number}"))
        return False


def engine_crashed(what: str) -> PermanentError:
    """Return the failure of a question that has killed the engine too often."""
    return PermanentError("killed_worker", f"{what} with this question alone in the engine")


def _no_room(error: BatchFailedError) -> PermanentError:
    failure = PermanentError(
        "out_of_memory",
        f"the question does not fit into memory even alone ({error}): lower --max-pixels, or use a larger GPU",
    )
    failure.__cause__ = error
    return failure
