"""What this process has: the extractor of its engine, its collector. Set by the bootsteps, used by the tasks."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from workers.errors import EngineStartError
from workers.settings import settings

if TYPE_CHECKING:
    from workers.collect.collector import Collector
    from workers.extract.extractor import Extractor
    from workers.monitor.presence import Announcer
    from workers.process.gpus import GpuWatch


class Current:
    """One of each for a process; None where it has none."""

    extractor: Extractor | None = None
    collector: Collector | None = None
    sweeper: threading.Thread | None = None
    gpu: GpuWatch | None = None
    announcer: Announcer | None = None


current = Current()


def current_extractor() -> Extractor:
    """Return this process's extractor. Raises EngineStartError in a process that serves no model."""
    if current.extractor is None:
        raise EngineStartError("this worker has no engine: it does not serve a model's lanes")
    return current.extractor


def current_collector() -> Collector:
    """Return this process's collector, also in a process that was only sent such a message."""
    from workers.collect.collector import Collector

    current.collector = current.collector or Collector(settings().data_roots)
    return current.collector
