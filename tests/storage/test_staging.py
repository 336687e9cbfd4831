"""What is staged of a slice is listed, and the listing serves a moment: what that may cost, and what it may not."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from storage.runs import staging
from storage.runs.pack import pack
from storage.runs.run import Run
from tests.support.builders import make_failure, make_run, make_sample, stage


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", 3)


def test_own_files_count_at_once(run: Run) -> None:
    assert not run.has_finished(1, 0)
    run.stage_sample(1, 0, make_sample(run.questions(1)[0]))
    run.stage_failure(1, 1, make_failure(run.questions(1)[1]))
    assert [run.has_finished(1, sequence) for sequence in range(3)] == [True, True, False]
    assert run.crashes_alone(1, 2) is None
    run.note_crash(1, 2, alone=True)
    assert run.crashes_alone(1, 2) == 1


def test_others_files_count_after_a_moment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_LISTED_SECONDS", 0.3)
    other = Run.open(run.output_dir)
    assert not run.has_finished(1, 0)
    assert run.crashes_alone(1, 1) is None
    other.stage_sample(1, 0, make_sample(run.questions(1)[0]))
    other.note_crash(1, 1, alone=True)
    time.sleep(0.31)
    assert run.has_finished(1, 0)
    assert run.crashes_alone(1, 1) == 1


def test_what_was_packed_meanwhile_is_finished(run: Run) -> None:
    stage(run, 1)
    assert run.has_finished(1, 0)
    assert pack(Run.open(run.output_dir), 1)
    assert [run.has_finished(1, sequence) for sequence in range(3)] == [True, True, True]


def test_a_name_alone_is_not_a_result(run: Run) -> None:
    stage(run, 1)
    assert run.has_finished(1, 1)
    (damaged,) = (run.output_dir / ".run/staging/001").glob("000000.*")
    damaged.write_bytes(b"\0" * 100)
    assert not run.has_finished(1, 0)
    assert not damaged.exists()
    assert run.has_finished(1, 1)


def test_a_slice_is_listed_once_a_moment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    original = run.store.list
    monkeypatch.setattr(run.store, "list", lambda prefix: listed.append(prefix) or original(prefix))
    for _ in range(2):
        for sequence in range(3):
            run.has_finished(1, sequence)
            run.crashes_alone(1, sequence)
    assert len(listed) == 1


def test_a_slow_listing_keeps_no_other_slice_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", 6)
    original, begun, go_on = run.store.list, threading.Event(), threading.Event()

    def slow(prefix: str) -> list[str]:
        if prefix.endswith("/001"):
            begun.set()
            assert go_on.wait(20)
        return original(prefix)

    monkeypatch.setattr(run.store, "list", slow)
    found: list[bool] = []
    asking = threading.Thread(target=lambda: found.append(run.has_finished(1, 0)))
    asking.start()
    assert begun.wait(20)
    assert not run.has_finished(2, 0)
    assert found == []
    go_on.set()
    asking.join(20)
    assert found == [False]
