"""Questions that are tried again and workers that refuse, as the files tell of them: in the report, and without a broker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from storage.runs import stalls
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.runs.stalls import note_retries, tried_again
from storage.views.report import render
from storage.views.report_data import gather
from tests.support.builders import make_failure, make_run, make_sample, stage
from tests.support.processes import command, wait_for
from tests.workers.test_tasks import Broken, retries, trace
from workers import tasks
from workers.collect.collector import collect_run
from workers.errors import BatchFailedError
from workers.extract import retried

__all__ = ["retries"]  # a fixture
WHY = "(3 of 6): engine_error: BatchFailedError: CUDA error"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retried, "_DELAY", 0.05)
    monkeypatch.setattr(retried, "_runs", {})
    yield
    wait_for(lambda: not any(waiting.due for waiting in retried._runs.values()), 10, "the last note is written")


def notes(run: Run) -> list[Path]:
    return list((run.output_dir / ".run" / "retries").glob("*"))


def test_a_task_leaves_a_note_until_its_question_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries) -> None:
    run = make_run(tmp_path / "run", 3)
    failing = Broken(run, "extract", BatchFailedError("CUDA error", ""))
    monkeypatch.setattr(tasks, "current_extractor", lambda: failing)
    for sequence in range(3):
        trace(run, retried=2, sequence=sequence)
    wait_for(lambda: tried_again(Run.open(run.location)) == f"3 tried again {WHY}", 10, "all three are told of")
    assert [path.name for path in notes(run)] == ["worker@host.json"]
    # One is computed here, one fails for good, and one by another worker.
    sample = make_sample(run.questions(1)[0])
    working = SimpleNamespace(open_run=failing.open_run, extract=lambda *_: sample)
    monkeypatch.setattr(tasks, "current_extractor", lambda: working)
    trace(run, retried=3, sequence=0)
    assert tried_again(run) == f"2 tried again {WHY}"
    monkeypatch.setattr(tasks, "current_extractor", lambda: failing)
    trace(run, retried=5, sequence=1)
    assert tried_again(run) == f"1 tried again {WHY}"
    assert run.staged(1) == {0: True, 1: False}
    stage(run, 1, skipped=[0, 1])
    assert tried_again(run) == ""
    retried.ended(run, 1, 2)
    wait_for(lambda: not notes(run), 10, "the note is taken back")
    assert retried._runs == {}


def test_notes_of_several_workers_name_a_question_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6)
    note_retries(run, "a/b@host", [(1, 0), (1, 1)], "(1 of 6): transient_error: x")
    note_retries(run, "c@host", [(1, 1), (2, 0), (99, 0)], WHY)
    assert tried_again(run) == f"3 tried again {WHY}"
    stage(run, 1)
    assert pack(run, 1)
    assert tried_again(run) == f"1 tried again {WHY}"
    note_retries(run, "c@host", [], WHY)
    assert tried_again(run) == ""


def test_what_is_no_note_of_now_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", 3)
    note_retries(run, "w@host", [(1, 0)], f"{WHY}\x1b[2J")
    assert tried_again(run) == f"1 tried again {WHY}\\x1b[2J"
    [path] = notes(run)
    whole = json.loads(path.read_text())
    for change in (
        {"run_id": "another"},
        {"at": time.time() - 1e4},
        {"questions": [[1, -1]]},
        {"why": 5},
        {"at": "NaN"},
    ):
        path.write_text(json.dumps(whole | change))
        assert tried_again(run) == ""
    path.write_bytes(b"[" * 100_000)
    assert stalls.stalls(run) == []
    path.unlink()
    path.symlink_to(tmp_path)
    assert stalls.stalls(run) == []
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("")
    assert stalls.stalls(run) == []


def test_a_note_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    (tmp_path / ".run" / "retries").write_text("in the way")
    retried.failed(run, 1, 0, "w@host", WHY)
    wait_for(lambda: not retried._runs[run.run_id].due, 10, "it was tried")
    retried.ended(run, 1, 0)
    wait_for(lambda: not retried._runs, 10, "it is forgotten")


def test_the_report_shows_what_does_not_get_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6)
    assert 'id="stalls"' not in render(gather(run))
    note_retries(run, "w@host", [(1, 0)], f"{WHY} <b>")
    run.note_refusal("other@host", "another <model>")
    page = render(gather(run))
    assert f"<li><bdi>1 tried again {WHY} &lt;b&gt;</bdi></li>" in page
    assert "<li><bdi>refused by other@host: another &lt;model&gt;</bdi></li>" in page


def test_a_finished_run_stands_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.collect.collector.feed", lambda run, published: 0)
    run = make_run(tmp_path, 3)
    note_retries(run, "w@host", [(1, 0)], WHY)
    run.note_refusal("other@host", "another model")
    for sequence, question in enumerate(run.questions(1)):
        run.stage_failure(1, sequence, make_failure(question))
    assert collect_run(run)
    assert 'id="stalls"' not in render(gather(run))
    assert notes(run) == []


def test_status_tells_it_without_a_broker(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    note_retries(run, "w@host", [(1, 0)], WHY)
    away = {"HALP_BROKER_URL": "redis://127.0.0.1:1/0"}
    assert f"1 tried again {WHY}\n" in command("producer", "status", tmp_path, **away).stderr
    (tmp_path / ".run" / "lock").touch()  # as `producer run` leaves it
    body = json.loads(command("producer", "status", tmp_path, "--json", **away).stdout)
    assert body["problems"] == [f"1 tried again {WHY}"]
