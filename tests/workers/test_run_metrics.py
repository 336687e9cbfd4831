"""What a collector shows after a sweep: whatever a stranger calls his runs, and whatever does not answer."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from redis.exceptions import ConnectionError as RedisConnectionError

from storage.runs.account import Account
from storage.runs.run import Run
from tests.support.builders import make_run
from workers.collect.collector import Collector
from workers.monitor import run_metrics
from workers.monitor.metrics import REGISTRY
from workers.monitor.troubles import troubles

ACCOUNT = Account(planned=10, written=4, failed=1, staged=2, outstanding=3, parts_planned=4, parts_published=1)
MEMORY = {"used": 10, "limit": 100}


@pytest.fixture(autouse=True)
def of_one_test_alone() -> Iterator[None]:
    yield
    run_metrics._last.gauges = run_metrics._none()
    troubles._by_location.clear()


@pytest.fixture
def collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collector:
    """One that asks no broker."""
    monkeypatch.setattr("workers.collect.collector.queue_lengths", lambda run: {"q": 3})
    monkeypatch.setattr("workers.collect.collector.broker_memory", lambda: MEMORY)
    return Collector((str(tmp_path),))


def refuse(error: Exception) -> NoReturn:
    raise error


def shown() -> dict[tuple[str, ...], float]:
    """Return the gauges as Prometheus reads them: value by name and labels' values."""
    families = text_string_to_metric_families(generate_latest(REGISTRY).decode())
    return {
        (s.name, *s.labels.values()): s.value for family in families if family.type == "gauge" for s in family.samples
        if not s.name.endswith("_created")
    }  # fmt: skip


def sweep(runs: list[Run], *, waiting: tuple[str, ...] = (), queued=lambda run: {"q": 3}, memory=lambda: MEMORY) -> None:
    run_metrics.after_sweep(0.1, len(runs), [(run, ACCOUNT) for run in runs], waiting, queued, memory)


def test_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 6)
    sweep([run], waiting=("/elsewhere",))
    found, name = shown(), run.location
    free = found.pop(("halp_disk_free_bytes", name))
    assert 0 < free < 1e18
    questions = {("halp_run_questions", name, state): getattr(ACCOUNT, state)
                 for state in ("written", "failed", "staged", "outstanding")}  # fmt: skip
    assert found == questions | {
        ("halp_unfinished_runs",): 1, ("halp_outstanding_questions",): ACCOUNT.outstanding,
        ("halp_run_parts", name, "published"): 1, ("halp_run_parts", name, "outstanding"): 3,
        ("halp_run_cancelled", name): 0, ("halp_run_waits", "/elsewhere"): 1, ("halp_queued_questions", "q"): 3,
        ("halp_redis_memory_bytes", "used"): 10, ("halp_redis_memory_bytes", "limit"): 100,
    }  # fmt: skip
    run.cancel()
    sweep([run])
    assert shown()["halp_run_cancelled", name] == 1
    sweep([])
    assert [key for key in shown() if name in key] == []


@pytest.mark.parametrize("name", ['a"b\\c', "two\nlines", "\x1b[31mred", b"\xff\xfe", 'x"} 1\nhalp_run_waits{run="y'])
def test_a_strangers_names_cost_nobody_the_metrics(tmp_path: Path, name: str | bytes) -> None:
    strange = make_run(tmp_path / os.fsdecode(name), 3)
    ours = make_run(tmp_path / "ours", 3)
    sweep([strange, ours], waiting=(strange.location,), queued=lambda run: {run.location: 1})
    found = shown()
    assert found["halp_run_questions", ours.location, "outstanding"] == 3
    [label] = [key[1] for key in found if key[0] == "halp_run_waits"]
    assert label.isprintable() and label.startswith(str(tmp_path))
    assert {key[1] for key in found if key[0] == "halp_run_questions"} == {label, ours.location}
    assert {key[1] for key in found if key[0] == "halp_queued_questions"} == {label, ours.location}


def test_many_runs_have_few_series(tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.collect.collector.MOST_RUNS", 3)
    for number in range(7):
        make_run(tmp_path / f"run{number}", 3, run_id=f"{number:016x}")
    collector._scan()
    collector._show_metrics(0.1)
    found = shown()
    assert found["halp_unfinished_runs",] == 7
    assert len({key[1] for key in found if key[0] == "halp_run_questions"}) == 3


def test_a_broker_that_is_away_hides_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def away(*_: object) -> dict[str, int]:
        refuse(RedisConnectionError("refused"))

    run = make_run(tmp_path / "run", 3)
    sweep([run])
    with caplog.at_level(logging.WARNING):
        sweep([run], memory=away, queued=away)
    found = shown()
    assert found["halp_run_questions", run.location, "written"] == 4
    assert [key for key in found if key[0] in {"halp_redis_memory_bytes", "halp_queued_questions"}] == []
    assert "the broker's metrics are not up to date: refused" in caplog.text


def test_a_scrape_sees_one_sweep(tmp_path: Path) -> None:
    """Prometheus takes a series that is missing once for one that has ended."""
    run = make_run(tmp_path / "run", 3)
    sweep([run])
    before, seen = shown(), []

    def look(run: Run) -> dict[str, int]:
        seen.append(shown())
        return {"q": 4}

    sweep([run], queued=look)
    [during] = seen
    assert during.keys() == before.keys()
    assert during["halp_queued_questions", "q"] == 3
    assert shown()["halp_queued_questions", "q"] == 4


def test_a_run_that_is_gone_hides_no_other(tmp_path: Path) -> None:
    gone, here = make_run(tmp_path / "gone", 3), make_run(tmp_path / "here", 3)
    (tmp_path / "gone").rename(tmp_path / "moved")
    sweep([gone, here])
    assert ("halp_disk_free_bytes", here.location) in shown()
    assert ("halp_disk_free_bytes", gone.location) not in shown()


def test_a_run_that_waits(tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep says what it could not bring forward; the next one, that it goes on."""
    run = make_run(tmp_path / "run", 3)
    with monkeypatch.context() as patch:
        patch.setattr("workers.collect.collector.feed", lambda *_: refuse(OSError(errno.EIO, "the disk")))
        collector.sweep()
    collector._show_metrics(0.1)
    assert shown()["halp_run_waits", run.location] == 1
    monkeypatch.setattr("workers.collect.collector.feed", lambda *_: 0)
    collector.bring_forward(run)
    collector._show_metrics(0.1)
    assert [key for key in shown() if key[0] == "halp_run_waits"] == []
