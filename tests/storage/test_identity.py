"""A path is not a run: what is staged or held open belongs to one run and one question, whatever lies at the path now."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import storage.identity
from storage.errors import DamagedError, ReplacedError
from storage.identity import Identity
from storage.runs.pack import pack, read_sidecar
from storage.runs.run import Run
from storage.sample import encode_sample
from tests.support.builders import make_failure, make_questions, make_run, make_sample, stage

OTHER = "fedcba9876543210"


def other_questions() -> list:
    """Return questions with the ids of the usual ones that ask something else."""
    return [replace(q, question=f"something else than: {q.question}") for q in make_questions(3)]


def test_what_a_run_before_left_under_the_same_name_is_not_packed(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", other_questions(), staged_identity=True, run_id=OTHER)
    stage(before, 1, failed={2})
    run = make_run(tmp_path / "run", 3, staged_identity=True)
    right = make_sample(run.questions(1)[1])
    run.stage_sample(1, 1, right)
    staging = run.output_dir / ".run" / "staging" / "001"
    for name in ("000000.safetensors", "000002.json"):
        shutil.copy(before.output_dir / ".run" / "staging" / "001" / name, staging / name)
    with pytest.raises(DamagedError, match="of another run or question, not question"):
        pack(run, 1)
    assert run.staged(1) == {0: True, 1: True}
    assert not run.has_finished(1, 0)  # asking for it is enough
    assert run.staged(1) == {1: True}  # what is right stays
    stage(run, 1)
    assert pack(run, 1)
    assert read_sidecar(run, 1).question_ids == ("q1", "q2", "q3")


def test_a_result_under_another_questions_name_is_not_packed(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3, staged_identity=True)
    stage(run, 1)
    staging = tmp_path / ".run" / "staging" / "001"
    shutil.copy(staging / "000000.safetensors", staging / "000001.safetensors")
    with pytest.raises(DamagedError):
        pack(run, 1)
    assert run.staged(1) == {0: True, 2: True}


def test_a_run_of_before_is_packed_and_only_that(tmp_path: Path) -> None:
    """Files that say nothing of their question are taken where the run's settings say that it may have such."""
    for bound in (False, True):
        run = make_run(tmp_path / str(bound), 3, staged_identity=bound)
        staging = tmp_path / str(bound) / ".run" / "staging" / "001"
        staging.mkdir(parents=True)
        for sequence, question in enumerate(run.questions(1)):
            (staging / f"{sequence:06d}.safetensors").write_bytes(encode_sample(make_sample(question)))
        if bound:
            with pytest.raises(DamagedError, match="does not say whose it is"):
                pack(run, 1)
            assert run.staged(1) == {}
        else:
            assert pack(run, 1)


@pytest.mark.parametrize("how", ["removed", "moved", "emptied"])
def test_nothing_is_staged_where_another_run_lies_now(tmp_path: Path, how: str) -> None:
    place = tmp_path / "run"
    run = make_run(place, 3, staged_identity=True)
    question = run.questions(1)[0]
    run.stage_sample(1, 0, make_sample(question))
    run.store.check()
    if how == "moved":
        place.rename(tmp_path / "away")
    elif how == "removed":
        shutil.rmtree(place)
    else:
        shutil.rmtree(place / ".run")
    with pytest.raises(ReplacedError):
        run.store.check()
    with pytest.raises(ReplacedError):
        run.stage_sample(1, 1, make_sample(question))
    after = make_run(place, other_questions(), staged_identity=True, run_id=OTHER)
    for write in (
        lambda: run.stage_sample(1, 1, make_sample(question)),
        lambda: run.stage_failure(1, 1, make_failure(question)),
        lambda: run.note_crash(1, 1, alone=True),
    ):
        with pytest.raises(ReplacedError, match="another run was begun there"):
            write()
    assert after.staged(1) == {}


def test_a_run_that_was_copied_back_is_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3, staged_identity=True)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "copy").rename(tmp_path / "run")
    run.store.check()
    assert Run.open(tmp_path / "run").run_id == run.run_id


def test_a_sidecar_of_another_run_describes_nothing(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", 3, run_id=OTHER)
    stage(before, 1)
    assert pack(before, 1)
    run = make_run(tmp_path / "run", 3)
    shutil.copytree(before.output_dir / ".run" / "parts", run.output_dir / ".run" / "parts")
    with pytest.raises(DamagedError, match="it describes another part, or a part of another run"):
        read_sidecar(run, 1)


def test_what_a_version_in_between_staged_counts(tmp_path: Path) -> None:
    """It took another digest of the settings."""
    run = make_run(tmp_path / "run", 3, staged_identity=True)
    stage(run, 1)
    question, settings = run.questions(1)[0], run.settings
    computed = set(storage.identity._COMPUTED)
    former = hashlib.sha256(settings.model_dump_json(include=computed, exclude_defaults=True).encode()).hexdigest()
    asked = json.dumps([former, question.question_id, question.image_id, question.question])
    text = f"{settings.run_id}/{hashlib.sha256(asked.encode()).hexdigest()[:32]}"
    assert text != run.identity(1, 0).text
    [path] = (run.output_dir / ".run/staging/001").glob("000000.*")
    path.write_bytes(encode_sample(make_sample(question), Identity(text, question.question_id, True)))
    assert run.has_finished(1, 0)
    assert pack(run, 1)
