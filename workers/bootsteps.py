"""What a worker process starts besides Celery: the engine where it serves a model's lanes, the sweeps where it collects."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.signals import worker_shutdown
from celery.worker import state

from workers.errors import EngineStartError
from workers.queues import COLLECT
from workers.settings import settings

if TYPE_CHECKING:
    from workers.extractor import Extractor

logger = logging.getLogger(__name__)
_POOL = "celery.worker.components:Pool"

_extractor: Extractor | None = None


def current_extractor() -> Extractor:
    """Return this process's extractor. Raises EngineStartError in a process that serves no model."""
    if _extractor is None:
        raise EngineStartError("this worker has no engine: it does not serve a model's lanes")
    return _extractor


class EngineStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Loads the model before the worker consumes."""

    requires = (_POOL,)

    def include_if(self, worker: Any) -> bool:
        """Tell whether the worker serves anything but the collector's queue."""
        return any(name != COLLECT for name in worker.app.amqp.queues.consume_from)

    def start(self, worker: Any) -> None:
        """Load the model; end the worker with the reason where that fails."""
        global _extractor  # noqa: PLW0603  (one engine per process)
        from workers.extractor import Extractor

        config = settings()
        logger.info("loading %s (%s)", config.model, config.dtype)
        try:
            _extractor = Extractor(config, worker.hostname, _stop_worker)
        except EngineStartError as error:
            logger.critical("%s", error)
            raise SystemExit(1) from None
        logger.info("loaded %s on %s", config.model, _extractor.card.environment["device"])


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _close_extractor(**_: Any) -> None:
    """Stop the engine after the last task: the pool is drained before this signal."""
    if _extractor is not None:
        _extractor.close()


def _stop_worker(error: BaseException) -> None:
    """Have Celery drain and exit with a failure: without an engine this worker can only fail tasks."""
    logger.critical("the worker ends: %s", error)
    state.should_stop = 1


class CollectorStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Sweeps the runs under the data roots every few seconds, whether or not a message asks for it."""

    requires = (_POOL,)

    def __init__(self, worker: Any, **_: Any) -> None:
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def include_if(self, worker: Any) -> bool:
        """Tell whether the worker serves the collector's queue."""
        return COLLECT in worker.app.amqp.queues.consume_from

    def start(self, worker: Any) -> None:
        """Start the sweeping thread."""
        self._thread = threading.Thread(target=self._sweep, name="collector", daemon=True)
        self._thread.start()

    def stop(self, worker: Any) -> None:
        """Let the sweep in progress end."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _sweep(self) -> None:
        from workers.collector import Collector

        config = settings()
        collector = Collector(config.data_roots)
        while not self._ended.wait(config.sweep_interval):
            collector.sweep()
