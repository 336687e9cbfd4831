"""Why a run stands still: what is tried again, how often it was, and which worker refuses, where a person looks."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from producer.show.display import tried_again
from producer.show.live import LiveAccount
from storage.runs.account import Account
from tests.producer.test_live import worker
from tests.support.builders import make_run
from tests.workers.test_tasks import Broken, retries, trace
from workers import tasks
from workers.errors import BatchFailedError
from workers.extract import attempts

__all__ = ["retries"]  # a fixture
WHY = "(3 of 6): engine_error: BatchFailedError: CUDA error"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_last", {})


def test_a_task_that_is_tried_again_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries) -> None:
    run = make_run(tmp_path / "run", 1)
    error = BatchFailedError("CUDA error\x1b[2J\nand more", "")
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "extract", error))
    trace(run, retried=2)
    assert len(retries()) == 1
    assert attempts.reasons() == {run.run_id: WHY + "\\x1b[2J"}


def test_reasons_are_few_short_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        attempts.note(f"run{number}", 1, 6, "x" * 1000)
    assert len(attempts.reasons()) == 64
    assert "run99" in attempts.reasons()
    assert max(map(len, attempts.reasons().values())) <= 201
    monkeypatch.setattr(attempts, "REMEMBERED", -1.0)
    assert attempts.reasons() == {}


def test_the_bar_and_the_status_say_why(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6)
    workers = [worker(retrying={}), worker(name="b", retrying={run.run_id: 1}, again={run.run_id: WHY, "other": "no"})]
    assert tried_again(run.run_id, workers) == f"1 tried again {WHY}"
    assert tried_again(run.run_id, workers[:1]) == ""
    run.note_refusal("extract-9@host", "another model")
    console = Console(file=io.StringIO(), width=200)
    with LiveAccount(console, run, lambda: workers) as live:
        live.show(Account(planned=6, outstanding=6, parts_planned=1))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"1 tried again {WHY}, refused by extract-9@host: another model" in shown
