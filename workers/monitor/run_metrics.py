"""Metrics of a collector: the runs, their disks and the broker as they were in its last sweep.

A scrape sees one sweep, whole. Gauges that are cleared and set again would miss a run for a moment, and Prometheus takes a
series that is missing for one that has ended: an alert that waits for half an hour would begin to wait again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress

from kombu.exceptions import OperationalError
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from storage.runs.account import Account
from storage.runs.run import Run
from storage.screen.terminal import one_line
from storage.stores.location import is_url
from workers.monitor.metrics import REGISTRY, sweep_seconds

logger = logging.getLogger(__name__)
MOST_RUNS = 200  # with series of their own, eight each: whoever may write below a data root may make runs
_GAUGES = {
    "halp_unfinished_runs": ("Unfinished runs that this collector sees.", ()),
    # Without a label: it is there, and 0, where there is no run, and a scaler that reads one number of the page finds it.
    # KEDA's takes a name's first sample, and did not find one with several labels: https://github.com/kedacore/keda/issues/6077.
    "halp_outstanding_questions": ("Questions to be computed, of all runs that are neither finished nor cancelled.", ()),
    "halp_run_questions": ("Questions of an unfinished run.", ("run", "state")),
    "halp_run_parts": ("Parts of an unfinished run.", ("run", "state")),
    "halp_run_cancelled": ("1 for an unfinished run that was cancelled, else 0.", ("run",)),
    "halp_run_waits": ("1 for a run that this collector cannot bring forward; its log says why.", ("run",)),
    "halp_disk_free_bytes": ("Bytes that are free where a run writes.", ("run",)),
    "halp_queued_questions": ("Questions in the queues of a run's model.", ("queue",)),
    "halp_redis_memory_bytes": ("Memory of Redis: used, and the limit (maxmemory, or its machine's).", ("kind",)),
}


class _LastSweep(Collector):
    """The gauges of the last sweep."""

    def __init__(self) -> None:
        self.gauges = _none()
        self.gauges["halp_outstanding_questions"].add_metric((), 0)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return them."""
        return self.gauges.values()


def _none() -> dict[str, GaugeMetricFamily]:
    return {name: GaugeMetricFamily(name, text, labels=labels) for name, (text, labels) in _GAUGES.items()}


_last = _LastSweep()
REGISTRY.register(_last)


def after_sweep(
    seconds: float,
    runs: int,
    accounts: Sequence[tuple[Run, Account]],
    waiting: Collection[str],
    queued: Callable[[Run], dict[str, int]],
    memory: Callable[[], dict[str, int]],
) -> None:
    """Show what a collector knows after a sweep over so many `runs`: `accounts` of MOST_RUNS at most, and which of all wait.

    `queued` returns the lengths of the queues of a run's model, and `memory` what the broker uses and may use.
    """
    sweep_seconds.observe(seconds)
    gauges = _none()
    gauges["halp_unfinished_runs"].add_metric((), runs)
    for location in sorted(waiting):
        gauges["halp_run_waits"].add_metric([_label(location)], 1)
    outstanding = sum(_add_run(gauges, run, account) for run, account in accounts)
    gauges["halp_outstanding_questions"].add_metric((), outstanding)
    try:
        for kind, size in memory().items():
            gauges["halp_redis_memory_bytes"].add_metric([kind], size)
        lengths = {queue: number for run, _ in accounts for queue, number in queued(run).items()}
        for queue, number in lengths.items():
            gauges["halp_queued_questions"].add_metric([_label(queue)], number)
    except (OSError, OperationalError, RedisError) as error:
        logger.warning("the broker's metrics are not up to date: %s", error)
    _last.gauges = gauges


def _add_run(gauges: dict[str, GaugeMetricFamily], run: Run, account: Account) -> int:
    """Add a run's samples; return how many of its questions are to be computed."""
    name = _label(run.location)
    for state in ("written", "failed", "staged", "outstanding"):
        gauges["halp_run_questions"].add_metric([name, state], getattr(account, state))
    gauges["halp_run_parts"].add_metric([name, "published"], account.parts_published)
    gauges["halp_run_parts"].add_metric([name, "outstanding"], account.parts_planned - account.parts_published)
    outstanding = account.outstanding
    with suppress(OSError):  # its sweep says what is wrong
        cancelled = run.is_cancelled()
        gauges["halp_run_cancelled"].add_metric([name], cancelled)
        outstanding = 0 if cancelled else outstanding
        if not is_url(run.location):
            gauges["halp_disk_free_bytes"].add_metric([name], shutil.disk_usage(run.location).free)
    return outstanding


def _label(text: str) -> str:
    """Return a stranger's name as a label. One that is not UTF-8 would cost every metric of this process."""
    return one_line(text)
