"""A path is not a run: what is staged or held open belongs to one run and one question, whatever lies at the path now."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from builders import make_failure, make_questions, make_run, make_sample, stage

from storage.errors import DamagedError, MisplacedError, RunGoneError
from storage.pack import pack, read_sidecar
from storage.run import Run

OTHER = "fedcba9876543210"


def other_questions() -> list:
    """Return questions with the ids of the usual ones that ask something else."""
    return [replace(q, question=f"something else than: {q.question}") for q in make_questions(3)]


def test_what_a_run_before_left_under_the_same_name_is_not_packed(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", other_questions(), bound_samples=True, run_id=OTHER)
    stage(before, 1, failed={2})
    run = make_run(tmp_path / "run", 3, bound_samples=True)
    right = make_sample(run.questions(1)[1])
    run.stage_sample(1, 1, right)
    staging = run.output_dir / ".run" / "staging" / "001"
    for name in ("000000.safetensors", "000002.json"):
        shutil.copy(before.output_dir / ".run" / "staging" / "001" / name, staging / name)
    with pytest.raises(MisplacedError, match="another question or run; removed, to be computed again"):
        pack(run, 1)
    assert run.staged(1) == {1: True}  # all of them at once, and what is right stays
    stage(run, 1)
    assert pack(run, 1)
    assert read_sidecar(run, 1).question_ids == ("q1", "q2", "q3")


def test_a_result_under_another_questions_name_is_not_packed(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3, bound_samples=True)
    stage(run, 1)
    staging = tmp_path / ".run" / "staging" / "001"
    shutil.copy(staging / "000000.safetensors", staging / "000001.safetensors")
    with pytest.raises(MisplacedError):
        pack(run, 1)
    assert run.staged(1) == {0: True, 2: True}


def test_a_run_of_before_is_packed_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that say nothing of their question are taken where the run's settings say that it may have such."""
    for bound in (False, True):
        run = make_run(tmp_path / str(bound), 3, bound_samples=bound)
        with monkeypatch.context() as patch:
            patch.setattr("storage.sample._metadata", _metadata_of_before)
            stage(run, 1)
        if bound:
            with pytest.raises(MisplacedError):
                pack(run, 1)
            assert run.staged(1) == {}
        else:
            assert pack(run, 1)


def _metadata_of_before(sample: object, identity: str) -> dict[str, str]:
    import json

    return {"answer": sample.answer, "facts": json.dumps(sample.facts)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["removed", "moved", "emptied"])
def test_nothing_is_staged_where_another_run_lies_now(tmp_path: Path, how: str) -> None:
    place = tmp_path / "run"
    run = make_run(place, 3, bound_samples=True)
    question = run.questions(1)[0]
    run.stage_sample(1, 0, make_sample(question))
    assert run.is_current()
    if how == "moved":
        place.rename(tmp_path / "away")
    elif how == "removed":
        shutil.rmtree(place)
    else:
        shutil.rmtree(place / ".run")
    assert not run.is_current()
    with pytest.raises(RunGoneError):
        run.stage_sample(1, 1, make_sample(question))
    after = make_run(place, other_questions(), bound_samples=True, run_id=OTHER)
    assert not run.is_current()
    for write in (
        lambda: run.stage_sample(1, 1, make_sample(question)),
        lambda: run.stage_failure(1, 1, make_failure(question)),
        lambda: run.note_death(1, 1, alone=True),
    ):
        with pytest.raises(RunGoneError, match="another is in its place"):
            write()
    assert after.staged(1) == {}


def test_a_run_that_was_copied_back_is_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3, bound_samples=True)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "copy").rename(tmp_path / "run")
    assert run.is_current()
    assert Run.open(tmp_path / "run").run_id == run.run_id


def test_a_sidecar_of_another_run_describes_nothing(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", 3, run_id=OTHER)
    stage(before, 1)
    assert pack(before, 1)
    run = make_run(tmp_path / "run", 3)
    shutil.copytree(before.output_dir / ".run" / "parts", run.output_dir / ".run" / "parts")
    with pytest.raises(DamagedError, match=f"it describes part 1 of run {OTHER}"):
        read_sidecar(run, 1)
