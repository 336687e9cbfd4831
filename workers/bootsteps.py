"""What a worker process starts besides Celery: the engine where it serves a model's lanes, the sweeps where it collects."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.signals import worker_shutdown, worker_shutting_down
from celery.worker import state
from celery.worker.request import Request

from storage.errors import UserError
from workers.current import current
from workers.errors import EngineStartError
from workers.extract import attempts
from workers.monitor.metrics import tally
from workers.monitor.presence import Announcer, Presence, of_this_process, telling
from workers.monitor.troubles import troubles
from workers.process.gpus import GpuWatch
from workers.queue.queues import COLLECT, EXTRACT
from workers.settings import settings

if TYPE_CHECKING:
    from workers.collect.collector import Collector
    from workers.collect.reporter import Reporter

logger = logging.getLogger(__name__)
_POOL = "celery.worker.components:Pool"
_GRACE = 5.0  # seconds that an image may take once the worker is asked to end


class PresenceStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Notes that this process lives, from before the model is loaded until the last task has ended."""

    requires = (_POOL,)

    def start(self, worker: Any) -> None:
        """Begin to tell; end the worker with the reason where the notes cannot be kept."""
        from workers.queue.app import served_queues
        from workers.queue.feed import redis_client

        consumed = worker.app.amqp.queues.consume_from
        config = settings()
        serving = any(name != COLLECT for name in consumed)
        served = [queues.prefix for queues in served_queues(config)] if serving else []
        first = replace(
            of_this_process(worker.hostname),
            serves=served[0] if serving else "",
            former=served[1] if len(served) > 1 else "",
            collects=COLLECT in consumed,
            data_roots=telling(config.data_roots),
        )
        if first.serves:
            first = replace(first, model=config.model, dtype=config.dtype)
        try:
            current.announcer = Announcer(lambda: _now(worker, first), config.runtime_dir, redis_client)
        except UserError as error:
            logger.critical("%s", error)
            raise SystemExit(1) from None
        current.announcer.start()


def _now(worker: Any, first: Presence) -> Presence:
    """Return this process's presence as it is now."""
    taken = state.total_count.get(EXTRACT, 0) - sum(r.name == EXTRACT for r in _living(state.active_requests))
    presence = replace(first, done=max(0, taken), swept=_swept(), waits=troubles.sentences())
    if current.extractor is None:
        return presence
    engine, facts = current.extractor.engine, current.extractor.info.environment
    use = current.gpu.last if current.gpu is not None else None
    return replace(
        presence,
        computed=tally.computed,
        batches=tally.batches,
        prefixes=tally.prefixes,
        engine_seconds=tally.seconds,
        exact_seconds=tally.exact_seconds,
        retrying=_retrying(worker.consumer) if worker.consumer else {},
        again=attempts.reasons(),
        gpu_memory_used=use.memory_used if use else None,
        gpu_memory_total=use.memory_total if use else None,
        gpu_busy=use.utilisation if use else None,
        device=facts["device"],
        whole=not current.extractor.info.shares_images,
        gpu=facts["gpu"],
        loading_since=engine.loading_since,
        busy_since=engine.busy_since,
        answered=engine.answered,
        image_since=current.extractor.preprocess.loading_since(),
    )


def _swept() -> float | None:
    """Return when the collector last ended with a run; long ago where its thread is dead."""
    if current.sweeper is None or current.collector is None:
        return None
    return current.collector.swept if current.sweeper.is_alive() else 0.0


def _retrying(consumer: Any) -> dict[str, int]:
    """Return how many questions of each run wait here for the time of their next attempt. A task's id begins with its run's."""
    entries = [scheduled.entry for scheduled in list(consumer.timer.schedule.queue)]
    waiting = [entry.args[0] for entry in entries if entry.args and not entry.canceled]
    ids = {r.id for r in waiting if isinstance(r, Request) and r.name == EXTRACT}  # a task may have been delivered twice
    return dict(Counter(task_id.partition("-")[0] for task_id in ids))


def _living(requests: Any) -> set[Any]:
    """Return what a WeakSet holds. Iterating over it would raise where another thread adds to it; its set is copied at once."""
    return {request for reference in requests.data.copy() if (request := reference()) is not None}


class EngineStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Loads the model before the worker consumes."""

    requires = (_POOL, PresenceStep)

    def include_if(self, worker: Any) -> bool:
        """Tell whether the worker serves anything but the collector's queue."""
        return any(name != COLLECT for name in worker.app.amqp.queues.consume_from)

    def start(self, worker: Any) -> None:
        """Load the model; end the worker with the reason where that fails."""
        from workers.extract.extractor import Extractor
        from workers.extract.patience import set_threads

        config = settings()
        set_threads(worker.concurrency)
        logger.info("loading %s (%s)", config.model, config.dtype)
        try:
            current.extractor = Extractor(config, worker.hostname, _stop_worker)
        except EngineStartError as error:
            logger.critical("%s", error)
            raise SystemExit(1) from None
        if current.extractor.info.environment["device"].startswith("cuda"):
            current.gpu = GpuWatch()
        logger.info("loaded %s on %s", config.model, current.extractor.info.environment["device"])


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _hasten_decoders(**_: Any) -> None:
    """Give images that are slow to decode back to other workers, rather than wait for each of them."""
    from storage.images.decoders import decoders

    decoders.end(_GRACE)


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _close_extractor(**_: Any) -> None:
    """Stop the engine after the last task: the pool is drained before this signal."""
    if current.announcer is not None:
        current.announcer.stop()
    if current.extractor is not None:
        current.extractor.close()


def _stop_worker(error: BaseException) -> None:
    """Have Celery drain and exit with a failure: without an engine this worker can only fail tasks."""
    logger.critical("the worker ends: %s", error)
    state.should_stop = 1


class CollectorStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Sweeps the runs under the data roots every few seconds, whether or not a message asks for it."""

    requires = (_POOL,)

    def __init__(self, worker: Any, **_: Any) -> None:
        self._ended = threading.Event()
        self._reporter: Reporter | None = None

    def include_if(self, worker: Any) -> bool:
        """Tell whether the worker serves the collector's queue."""
        return COLLECT in worker.app.amqp.queues.consume_from

    def start(self, worker: Any) -> None:
        """Start the sweeping thread."""
        from workers.collect.collector import Collector
        from workers.collect.reporter import Reporter

        self._reporter = Reporter()
        self._reporter.start()
        current.collector = Collector(settings().data_roots, self._reporter.add)
        current.sweeper = threading.Thread(target=self._sweep, args=(current.collector,), name="collector", daemon=True)
        current.sweeper.start()

    def stop(self, worker: Any) -> None:
        """Let the sweep in progress end, and the reports that wait be written."""
        self._ended.set()
        if current.sweeper is not None:
            current.sweeper.join()
        if self._reporter is not None:
            self._reporter.close()

    def _sweep(self, collector: Collector) -> None:
        try:
            while not self._ended.wait(settings().sweep_interval):
                try:
                    collector.sweep()
                except Exception:  # whatever it is, the next sweep is another one
                    logger.exception("a sweep failed")
        finally:
            if not self._ended.is_set():
                _stop_worker(RuntimeError("its sweeping thread died"))
