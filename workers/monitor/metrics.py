"""Metrics for Prometheus: what a worker and a collector count, served over HTTP where `HALP_METRICS_PORT` is set."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from celery import bootsteps, signals
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from storage.runs.account import Account
from storage.runs.run import Run
from storage.sample import COMPUTED_AT, ENGINE_SECONDS, Sample
from storage.stores.location import is_url
from workers.engine.interface import Request
from workers.errors import PermanentError
from workers.queue.queues import EXTRACT
from workers.settings import settings

logger = logging.getLogger(__name__)

REGISTRY = CollectorRegistry()
_questions = Counter(
    "halp_questions", "Attempts at questions that this worker ended, by how they ended.", ["state"], registry=REGISTRY
)
_failures = Counter("halp_failures", "Questions that failed for good, by reason.", ["reason"], registry=REGISTRY)
_batch_size = Histogram(
    "halp_batch_size", "Questions in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=REGISTRY
)
_engine_seconds = Histogram(
    "halp_engine_seconds",
    "Seconds that the engine took for a batch.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150),
    registry=REGISTRY,
)
_failed_batches = Counter("halp_failed_batches", "Batches that raised an error or killed the engine.", registry=REGISTRY)
_prefixes = Counter(
    "halp_image_prefixes",
    "Questions by their image's prefix: computed with them, or shared with one before.",
    ["kind"],
    registry=REGISTRY,
)
_run_questions = Gauge("halp_run_questions", "Questions of an unfinished run.", ["run", "state"], registry=REGISTRY)
# Without a label: it is there, and 0, where there is no run, and a scaler that reads one number of the page finds it. KEDA's
# takes the first sample of a name, and did not find one with several labels: https://github.com/kedacore/keda/issues/6077.
_outstanding = Gauge(
    "halp_outstanding_questions",
    "Questions that workers have to compute, of all runs that are neither finished nor cancelled.",
    registry=REGISTRY,
)
_run_parts = Gauge("halp_run_parts", "Parts of an unfinished run.", ["run", "state"], registry=REGISTRY)
_queued = Gauge("halp_queued_questions", "Questions in the queues of a run's model.", ["queue"], registry=REGISTRY)
_free = Gauge("halp_disk_free_bytes", "Bytes that are free where a run writes.", ["run"], registry=REGISTRY)
_sweep_seconds = Histogram(
    "halp_sweep_seconds",
    "Seconds that a sweep over all unfinished runs took.",
    buckets=(0.01, 0.05, 0.25, 1, 5, 30, 120),
    registry=REGISTRY,
)


@dataclass(slots=True)
class Tally:
    """What the engine of this process has computed: written by the batcher's threads, where nothing else is said."""

    computed: int = 0
    batches: int = 0
    prefixes: int = 0
    seconds: float = 0.0  # that the engine took for them
    exact_seconds: float = 0.0  # of these for drift certificates; written by whoever has one computed


tally = Tally()


class MetricsStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Serves the metrics while the worker lives."""

    def __init__(self, worker: Any, **_: Any) -> None:
        self._server: Any = None

    def include_if(self, worker: Any) -> bool:
        """Tell whether metrics are wanted."""
        return settings().metrics_port > 0

    def start(self, worker: Any) -> None:
        """Listen. A port that is taken costs the metrics and not the work."""
        config = settings()
        try:
            self._server, _ = start_http_server(config.metrics_port, config.metrics_address, REGISTRY)
        except OSError as error:
            logger.error("no metrics on %s:%d: %s", config.metrics_address, config.metrics_port, error.strerror)
            return
        logger.info("metrics on http://%s:%d/metrics", config.metrics_address, config.metrics_port)

    def stop(self, worker: Any) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()


@signals.task_success.connect  # type: ignore[untyped-decorator]
def _count_success(sender: Any, result: Any, **_: Any) -> None:
    if sender.name == EXTRACT:
        _questions.labels(str(result).replace(" ", "_")).inc()


@signals.task_retry.connect  # type: ignore[untyped-decorator]
def _count_retry(sender: Any, **_: Any) -> None:
    if sender.name == EXTRACT:
        _questions.labels("retried").inc()


@signals.task_failure.connect  # type: ignore[untyped-decorator]
def _count_failure(sender: Any, exception: BaseException, **_: Any) -> None:
    if sender.name == EXTRACT:
        _questions.labels("failed").inc()
        _failures.labels(exception.reason if isinstance(exception, PermanentError) else type(exception).__name__).inc()


def measured(run_batch: Callable[[Sequence[Request]], list[Sample]]) -> Callable[[Sequence[Request]], list[Sample]]:
    """Return the engine's function with its batches counted and timed: each sample says when, and its share of the time.

    Of two that are asked for at once, the second one's time begins with the answer to the first.
    """
    lock, answered = threading.Lock(), 0.0

    def run(requests: Sequence[Request]) -> list[Sample]:
        nonlocal answered
        begun = time.monotonic()
        try:
            samples = run_batch(requests)
        except Exception:  # counted, and raised again
            with lock:
                answered = time.monotonic()
            _failed_batches.inc()
            raise
        with lock:
            now = time.monotonic()
            seconds, answered = now - max(begun, answered), now
            tally.seconds += seconds
            tally.computed += len(samples)
            tally.batches += 1
            tally.prefixes += sum(sample.facts.get("image_prefix") == "computed" for sample in samples)
        _engine_seconds.observe(seconds)
        _batch_size.observe(len(requests))
        times = {COMPUTED_AT: time.time(), ENGINE_SECONDS: seconds / max(1, len(samples))}
        for sample in samples:
            sample.facts.update(times)
            if kind := sample.facts.get("image_prefix"):
                _prefixes.labels(kind).inc()
        return samples

    return run


def after_sweep(seconds: float, runs: Iterable[tuple[Run, Account]], queued: Callable[[Run], dict[str, int]]) -> None:
    """Show what a collector knows after a sweep; `queued` returns the lengths of the queues of a run's model."""
    _sweep_seconds.observe(seconds)
    runs = list(runs)
    _outstanding.set(sum(account.outstanding for run, account in runs if not run.is_cancelled()))
    for gauge in (_run_questions, _run_parts, _queued, _free):
        gauge.clear()
    for run, account in runs:
        for state in ("written", "failed", "staged", "outstanding"):
            _run_questions.labels(run.location, state).set(getattr(account, state))
        _run_parts.labels(run.location, "published").set(account.parts_published)
        _run_parts.labels(run.location, "outstanding").set(account.parts_planned - account.parts_published)
        for queue, number in queued(run).items():
            _queued.labels(queue).set(number)
        if not is_url(run.location):
            _free.labels(run.location).set(shutil.disk_usage(run.location).free)
