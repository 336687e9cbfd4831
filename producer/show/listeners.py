"""Who serves a run right now, and what stalls it: asked of the broker and of the disk, and never needed for the account."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from producer.local_state import begun_here
from producer.show.display import tried_again
from producer.show.roots import kept_out
from storage.errors import DamagedError
from storage.runs import stalls
from storage.runs.run import Run, part_names
from storage.runs.soundness import check_private_files
from storage.screen.terminal import duration
from storage.stores.space import obstacle
from workers.monitor.presence import Presence

_LOOKED_AT = 20  # slices of the plan that are next
_ALONE = (
    "The account is from the files. The queue was not asked: `producer run` brings its own; if it was stopped, the same "
    "command goes on."
)


@dataclass(frozen=True, slots=True)
class Listeners:
    """The workers that serve a run's model, and a sentence on each thing that stalls the run."""

    workers: list[Presence]
    problems: list[str]
    note: str = ""  # why the queue was not asked, where that is as it should be

    @property
    def names(self) -> list[str]:
        """Names of the workers."""
        return [worker.name for worker in self.workers]


def serving_workers(run: Run) -> list[Presence]:
    """Return the workers that serve a run's model; none while the broker does not answer."""
    from workers.queue.feed import queues_of

    return [presence for presence in _everybody() if presence.serves_queues(queues_of(run).prefix)]


def workers_kept_out(run: Run) -> list[str]:
    """Return a sentence on those who would work on a run and may not touch it; none while the broker does not answer."""
    return list(kept_out(run, _everybody()))


def _everybody() -> list[Presence]:
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from workers.monitor.presence import present
    from workers.queue.feed import redis_client

    try:
        with redis_client() as client:
            return present(client)
    except (OperationalError, RedisError, OSError):
        return []


def listening_workers(run: Run) -> Listeners:
    """Ask the broker who serves the run, and look for what stalls it.

    A run of `producer run` had a broker of its own: where ours is away, or was never told of the run, nothing is amiss.
    """
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from workers.monitor.presence import present
    from workers.queue.app import app
    from workers.queue.broker import trouble
    from workers.queue.feed import broker_trouble, queues_of, redis_client
    from workers.queue.foreign import foreign_keys, sentence
    from workers.queue.home import is_known, other_home
    from workers.queue.queues import COLLECT

    disk = [f"Nothing can be written: {text}. Workers wait until it can." for text in [obstacle(run.location)] if text]
    try:
        check_private_files(run, _LOOKED_AT)
    except DamagedError as error:
        disk.append(f"The run cannot go on: {error}")
    address, alone = app.connection_for_write().as_uri(), begun_here(run)
    try:
        with redis_client() as client:
            if alone and not is_known(client, run):
                return Listeners([], [*disk, *_told_in_files(run)], _ALONE)
            everybody = present(client)
            copied = other_home(client, run)
            queues = queues_of(run)
            foreign = foreign_keys(client, [COLLECT, queues.retry, *queues.lanes])
    except (OperationalError, RedisError, OSError) as error:
        disk += _told_in_files(run)
        if alone:
            return Listeners([], disk, _ALONE)
        asked = f"The account is from the files. The queue was not asked: the broker {address} {trouble(error)}"
        return Listeners([], [*disk, asked])
    full = broker_trouble()
    serving = [presence for presence in everybody if presence.serves_queues(queues_of(run).prefix)]
    strange = [sentence(name, kind) for name, kind in foreign.items()]
    problems = [*disk, *([f"The broker {full}"] if full else []), *strange]
    if copied:
        problems.append(
            f"This is a copy of {copied}, which is worked on, and this is not: move one of them out of the data roots"
        )
    problems += [f"{p.name}: {p.waits[run.location]}" for p in everybody if run.location in p.waits]
    return Listeners(serving, [*problems, *_problems(run, address, serving, everybody)])


def _told_in_files(run: Run) -> list[str]:
    """Say what is tried again as far as the run's files know; nothing where that is nothing."""
    with suppress(OSError, DamagedError):
        return [sentence] if (sentence := stalls.tried_again(run)) else []
    return []


def _problems(run: Run, address: str, serving: list[Presence], everybody: list[Presence]) -> Iterator[str]:
    from workers.settings import settings

    if not serving:
        wanted = run.settings
        command = f"workers extract --model {wanted.model} --dtype {wanted.dtype}"
        if wanted.revision != "main":
            command += f" --revision {wanted.revision}"
        yield f"No worker at {address} serves this run's model. Start one: {command}"
    elif not any(presence.collects for presence in everybody):
        yield f"No collector at {address} packs this run. Start one: workers collect {run.location}"
    yield from kept_out(run, everybody)
    if again := tried_again(run.run_id, serving):
        yield again
    for worker in serving:
        if worker.busy_since is not None and time.time() - worker.busy_since > settings().engine_timeout + 60:
            yield f"{worker.name} has been busy with one batch for {duration(time.time() - worker.busy_since)}"
    if number := _undescribed_parts(run):
        noun = "part has" if number == 1 else "parts have"
        yield f"{number} published {noun} no sidecar: a collector writes it at its next sweep: workers collect {run.location}"
    waiting = _waiting_parts(run)
    if waiting >= (settings().staging_limit or float("inf")):
        yield (
            f"{waiting} finished parts wait for the collector, and no further ones are computed until it has packed some "
            "(HALP_STAGING_LIMIT): see its log"
        )


def _undescribed_parts(run: Run) -> int:
    """Return how many published parts have lost their sidecar, or have none yet."""
    names, described = set(part_names(run.location)), run.parts_with_sidecar()
    return sum(piece.part not in described and run.part_name(piece.part) in names for piece in run.slices)


def _waiting_parts(run: Run) -> int:
    """Return how many unpublished parts have every question staged."""
    published = run.parts_with_sidecar()
    staging = set(run.staging_directories())
    return sum(
        len(run.staged(piece.part)) >= piece.size
        for piece in run.slices
        if run.label(piece.part) in staging and piece.part not in published
    )
