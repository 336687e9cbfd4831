"""A run that cannot be read, written or understood fails alone: others go on, it is said once, and it is tried again."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery.exceptions import Ignore
from celery.worker import state

from producer.retrying import plan_retry
from storage.errors import DamagedError
from storage.runs.run import Run
from storage.stores import handles
from tests.support.builders import make_run, stage
from tests.support.processes import wait_for
from workers import bootsteps, tasks
from workers.collect import collector as collecting
from workers.collect import scanner
from workers.collect.collector import Collector
from workers.current import current
from workers.errors import RunWaitsError, WorkerEndsError
from workers.extract import patience as staging
from workers.monitor import troubles
from workers.monitor.troubles import Troubles
from workers.settings import WorkerSettings

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Troubles]:
    """Troubles of this test's own."""
    own = Troubles()
    for module in (troubles, scanner, staging, tasks, collecting):
        monkeypatch.setattr(module, "troubles", own)
    monkeypatch.setattr(collecting, "feed", lambda run, published: 0)
    monkeypatch.setattr(staging, "look_again", lambda run_id: None)
    yield own


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(troubles, "time", SimpleNamespace(monotonic=lambda: now.now))
    return now


def test_a_trouble_is_said_once_and_tried_again_with_growing_pauses(
    fresh: Troubles, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    assert fresh.may_try("/a")
    pauses = []
    for number in range(12):
        fresh.note("/a", f"waits: its disk is full ({number} MB free)")
        if number > 2:
            fresh.note("/a", f"waits: its disk is full ({number} MB free)")  # another thread, at the same moment
        begun = clock.now
        while not fresh.may_try("/a"):
            clock.now += 0.5
        assert fresh.may_try("/a") is (number < 2)  # one tries, not all
        pauses.append(clock.now - begun)
        clock.now += 100
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30]
    assert len(caplog.records) == 1
    fresh.note("/a", "waits: another thing")
    assert len(caplog.records) == 2
    assert fresh.may_try("/b")
    assert fresh.sentences() == {"/a": "waits: another thing"}
    assert fresh.clear("/a")
    assert not fresh.clear("/a")
    assert fresh.may_try("/a")


def _waiters(number: int, location: str, write: Callable[[], str]) -> tuple[list[threading.Thread], list[object]]:
    results: list[object] = []

    def call() -> None:
        try:
            results.append(staging.retry_write(write, location, "id"))
        except (RunWaitsError, WorkerEndsError) as error:
            results.append(type(error))

    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads, results


def test_few_threads_wait_for_one_disk(fresh: Troubles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen two for one run and eight for all; whoever waits goes on when there is room."""
    monkeypatch.setattr(state, "should_stop", None)
    staging.set_threads(16)
    full = threading.Event()
    full.set()

    def write() -> str:
        if full.is_set():
            raise FULL
        return "written"

    threads = []
    outcomes = []
    for place in ("/a", "/b", "/c", "/d", "/e"):
        started, results = _waiters(4, place, write)
        threads += started
        outcomes.append(results)
    wait_for(lambda: sum(map(len, outcomes)) == 12, 20, "the others are let go")
    assert [len(results) for results in outcomes] == [2, 2, 2, 2, 4]
    assert {outcome for results in outcomes for outcome in results} == {RunWaitsError}
    assert staging.retry_write(lambda: "written", "/sound", "id") == "written"
    full.clear()
    for thread in threads:
        thread.join(20)
    assert [results.count("written") for results in outcomes] == [2, 2, 2, 2, 0]
    assert fresh.sentences().keys() <= {"/e"}


def test_a_worker_with_one_thread_waits_for_no_disk() -> None:
    staging.set_threads(1)
    try:
        with pytest.raises(RunWaitsError):
            staging.retry_write(lambda: (_ for _ in ()).throw(FULL), "/a", "id")
    finally:
        staging.set_threads(16)


class _Task:
    """What a task's function sees of Celery's."""

    def __init__(self, retries: int) -> None:
        self.request = SimpleNamespace(retries=retries, id="1-001-0", hostname="w@h")
        self.events: list[str] = []

    def send_event(self, kind: str, **_: object) -> None:
        self.events.append(kind)


@pytest.mark.parametrize(
    ("error", "retries", "outcome"),
    [
        (OSError(errno.EIO, "I/O error"), 0, "retry"),
        (OSError(errno.EIO, "I/O error"), 3, tasks.PUT_OFF),
        (DamagedError("the plan's slice 1 was changed"), 0, tasks.PUT_OFF),
        (RunWaitsError("enough wait"), 0, tasks.PUT_OFF),
    ],
)
def test_a_question_whose_run_is_in_trouble_takes_no_room_from_others(
    tmp_path: Path, fresh: Troubles, monkeypatch: pytest.MonkeyPatch, error: Exception, retries: int, outcome: str
) -> None:
    run = make_run(tmp_path, 1)
    arguments = {"run_dir": run.location, "run_id": run.run_id, "part": 1, "sequence": 0}
    arguments |= {"question_id": "q1", "image_id": "i"}
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        raise error

    class Retried(Exception):
        pass

    monkeypatch.setattr(tasks, "_extract", fail)
    monkeypatch.setattr(tasks, "_retry", lambda *_: Retried())
    task = tasks.extract.run.__func__
    if outcome == "retry":
        with pytest.raises(Retried):
            task(_Task(retries), **arguments)
    else:
        dropped = _Task(retries)
        with pytest.raises(Ignore, match=outcome):  # not SUCCESS, which would count as done
            task(dropped, **arguments)
        assert dropped.events == ["task-revoked"]
    for _ in range(3):
        fresh._by_location.setdefault(run.location, troubles._Trouble("waits: x", 0.0)).until = time.monotonic() + 9
        with pytest.raises(Ignore, match=tasks.PUT_OFF):
            task(_Task(0), **arguments)
    assert calls == [1]  # nothing is begun while the run waits


def _evil(kind: str, place: Path) -> None:
    run = make_run(place, 3)
    private = place / ".run"
    if kind == "deep run.json":
        (private / "run.json").write_bytes(b"[" * 10**6)
    elif kind == "no run.json":
        (private / "run.json").unlink()
        (private / "run.json").mkdir()
    elif kind == "stray sidecar":
        (private / "parts").mkdir()
        (private / "parts" / ".DS_Store").write_text("x")
        (private / "summary.json").write_text('{"parts_planned": 1}')
    elif kind == "nested summary":
        (private / "summary.json").write_text("[" * 10**5)
    elif kind == "list for a summary":
        (private / "summary.json").write_text("[]")
    elif kind == "cut plan":
        (private / "plan" / "000.json").write_text("{")
    elif kind == "gone slice":
        stage(run, 1)
        (place / run.slices[0].key).unlink()
    elif kind == "loop":
        shutil.rmtree(private)
        private.symlink_to(private)
    elif kind == "file in the way":
        (place / ".run" / "staging").write_text("x")
        (place / ".run" / "tmp").rmdir()
        (place / ".run" / "tmp").write_text("x")


@pytest.mark.parametrize(
    "kind",
    [
        "deep run.json",
        "no run.json",
        "stray sidecar",
        "nested summary",
        "list for a summary",
        "cut plan",
        "gone slice",
        "loop",
        "file in the way",
    ],
)
def test_one_bad_run_stops_no_other(tmp_path: Path, kind: str) -> None:
    _evil(kind, tmp_path / "evil")
    sound = [make_run(tmp_path / name, 3) for name in ("a", "z")]
    for run in sound:
        stage(run, 1)
    collector = Collector((str(tmp_path),))
    for _ in range(3):
        collector._next_scan = 0.0
        collector.sweep()
    assert all(run.is_finished() for run in sound)


def test_a_directory_that_cannot_be_looked_into_hides_no_run(
    tmp_path: Path, fresh: Troubles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and taken up when it can be; a run in it that is known is kept meanwhile."""
    known, good = make_run(tmp_path / "bad-known", 3), make_run(tmp_path / "good", 3)
    collector = Collector((str(tmp_path),))
    collector.sweep()
    assert collector._scanner.runs.keys() == {known.location, good.location}
    unknown = make_run(tmp_path / "bad-unknown", 3)
    exists = handles.exists

    def refuse(path: str) -> bool:
        if "/bad-" in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return exists(path)

    stage(good, 1)
    with monkeypatch.context() as patch:
        patch.setattr(handles, "exists", refuse)
        for _ in range(3):
            collector._next_scan = 0.0
            collector.sweep()
        assert good.is_finished()
        assert list(collector._scanner.runs) == [known.location]
        assert "may not read or write" in fresh.sentences()[unknown.location]
    stage(unknown, 1)
    stage(known, 1)
    collector._next_scan = 0.0
    collector.sweep()
    assert unknown.is_finished()
    assert known.is_finished()
    assert fresh.sentences() == {}


def test_finished_runs_are_remembered_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / str(number), 6) for number in range(4)]
    for run in runs:
        stage(run, 1, failed=[1])
        stage(run, 2)
    collector = Collector((str(tmp_path),))
    collector.sweep()
    opened: list[str] = []
    open_run = Run.open
    monkeypatch.setattr(Run, "open", lambda location: opened.append(Path(location).name) or open_run(location))

    def scanned() -> list[str]:
        opened.clear()
        collector._next_scan = 0.0
        collector.sweep()
        return sorted(opened)

    assert scanned() == ["0", "1", "2", "3"]
    assert scanned() == []
    plan_retry(runs[0])
    os.unlink(runs[1].store.path(runs[1].sidecar_key(2)))
    late = tmp_path / "2" / ".run" / "staging" / "001" / "000000.safetensors"
    late.parent.mkdir(parents=True)
    late.write_bytes(b"late")
    assert scanned() == ["0", "1", "2"]
    assert not late.exists()
    assert runs[1].is_finished()
    assert scanned() == ["1", "2"]  # as they are now
    assert scanned() == []


def test_another_run_in_the_same_place_is_another_run(tmp_path: Path) -> None:
    old = make_run(tmp_path / "run", 3)
    collector = Collector((str(tmp_path),))
    collector.sweep()
    shutil.rmtree(tmp_path / "run")
    collector.sweep()
    assert collector._scanner.runs == {}
    new = make_run(tmp_path / "run", 6, run_id="f" * 16)
    stage(new, 1)
    stage(new, 2)
    collector._next_scan = 0.0
    collector.sweep()
    assert new.is_finished()
    shutil.rmtree(tmp_path / "run")
    make_run(tmp_path / "run", 3)
    collector._next_scan = 0.0
    collector.sweep()
    shutil.rmtree(tmp_path / "run")
    make_run(tmp_path / "run", 6, run_id="e" * 16)
    collector.sweep()  # between two scans
    assert [run.run_id for run in collector._scanner.runs.values()] == ["e" * 16]
    assert old.run_id != "e" * 16


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sweep_that_fails_is_followed_by_another_and_a_dead_thread_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swept: list[int] = []

    class Broken:
        swept = 1.0

        def sweep(self) -> None:
            swept.append(1)
            raise SystemExit if len(swept) == 3 else RuntimeError("no")

    monkeypatch.setattr(bootsteps, "settings", lambda: WorkerSettings(sweep_interval=0.01))
    monkeypatch.setattr(state, "should_stop", None)
    step = bootsteps.CollectorStep(None)
    thread = threading.Thread(target=step._sweep, args=(Broken(),))
    monkeypatch.setattr(current, "collector", Broken())
    monkeypatch.setattr(current, "sweeper", thread)
    thread.start()
    assert bootsteps._swept() in {0.0, 1.0}
    thread.join(20)
    assert len(swept) == 3
    assert state.should_stop == 1
    assert bootsteps._swept() == 0.0  # what `workers health` takes for a collector that does not sweep


def test_one_thread_at_a_time_brings_a_run_forward(tmp_path, monkeypatch):
    """A hint's task and a sweep would pack the same part at once."""
    inside, most = [], []

    def collect_run(run, _):
        inside.append(run)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return False

    monkeypatch.setattr("workers.collect.collector.collect_run", collect_run)
    collector, run = Collector((str(tmp_path),)), make_run(tmp_path / "run", 3)
    threads = [threading.Thread(target=collector.bring_forward, args=(run,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
