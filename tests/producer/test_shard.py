"""`--shard`: a table is cut the same way everywhere; the shards are disjoint, and together the table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from producer.check.check import check
from producer.dataset.selection import Shard, select
from producer.options import RunOptions, run_options
from producer.planning import plan_run
from storage.errors import UserError
from storage.question import Question
from storage.runs.run import Run
from storage.settings import RunSettings
from tests.support.builders import make_questions, make_settings
from tests.support.processes import command, write_csv


def question(number: int, image: str) -> Question:
    return Question(f"q{number}", image, "What?", "", number + 1, {})


@given(
    st.lists(st.sampled_from(["", "a.jpg", "b.jpg", "日本.png", '["a.jpg", "b.jpg"]']) | st.text(max_size=3)), st.integers(1, 9)
)
def test_shards_are_disjoint_and_together_the_table(images: list[str], of: int) -> None:
    table = [question(number, image) for number, image in enumerate(images)]
    shards = [[q for q in table if Shard(number, of).holds(q)] for number in range(1, of + 1)]
    assert sorted(q.question_id for shard in shards for q in shard) == sorted(q.question_id for q in table)
    for image in set(images) - {""}:
        assert sum(any(q.image_id == image for q in shard) for shard in shards) == 1
    assert all([q.csv_row for q in shard] == sorted(q.csv_row for q in shard) for shard in shards)


def test_a_shard_is_the_same_in_every_version_and_on_every_machine() -> None:
    """What two clusters compute must fit together, though the one was installed later."""
    questions = make_questions(30, per_image=3)
    held = {n: [q.image_id for q in questions[::3] if Shard(n, 3).holds(q)] for n in (1, 2, 3)}
    assert held == {
        1: ["image_3.jpg", "image_5.jpg", "image_9.jpg"],
        2: ["image_0.jpg", "image_1.jpg", "image_2.jpg", "image_4.jpg", "image_8.jpg"],
        3: ["image_6.jpg", "image_7.jpg"],
    }
    alone = [question(number, "") for number in range(6)]
    assert [q.question_id for q in alone if Shard(1, 2).holds(q)] == ["q1"]


def test_shards_are_about_equally_large() -> None:
    sizes = Counter(n for q in make_questions(8000, per_image=2) for n in range(1, 9) if Shard(n, 8).holds(q))
    assert sizes.total() == 8000
    assert max(sizes.values()) - min(sizes.values()) < 250


def test_they_are_of_what_limit_and_test_take() -> None:
    questions = make_questions(100, per_image=1)
    both = [select(questions, limit=20, test=False, shard=Shard(number, 2)) for number in (1, 2)]
    assert sorted(q.csv_row for shard in both for q in shard) == list(range(1, 21))
    three = select(questions, limit=None, test=True)
    held = [q for q in three if Shard(1, 2).holds(q)] or [q for q in three if Shard(2, 2).holds(q)]
    assert select(questions, limit=None, test=True, shard=Shard(1 if Shard(1, 2).holds(held[0]) else 2, 2)) == held


@pytest.mark.parametrize("text", ["0/8", "9/8", "a/b", "2", "2/", "/8", "-1/8", "1/0", "2/8/3", " 2/8", "２/8", "1/9999999999"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Shard.parse(text)
    assert str(caught.value) == f"--shard {text}: give the shard's number, from 1 on, and how many there are, as in 2/8"


def test_a_shard_is_written_in_one_way() -> None:
    assert str(Shard.parse("02/08")) == "2/8"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunOptions:
    """Twelve questions about six images; the model is a name."""
    monkeypatch.setenv("HALP_ENGINE", "fake:0")
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (40, 30), (number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
    rows = [{"question_id": f"q{n}", "image_id": f"{n % 6}.png", "question": f"Why {n}?", "answer": ""} for n in range(12)]
    fields: dict[str, Any] = {"images_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "out")}
    return run_options(write_csv(tmp_path / "vqa.csv", rows), **fields)


def test_a_run_is_of_its_shard_and_of_no_other(options: RunOptions, tmp_path: Path) -> None:
    runs = [plan_run(replace(options, shard=Shard(n, 2), output_dir=str(tmp_path / f"s{n}"))) for n in (1, 2)]
    planned = [[q.question_id for piece in run.slices for q in run.questions(piece.part)] for run in runs]
    assert sorted(planned[0] + planned[1]) == sorted(f"q{n}" for n in range(12))
    assert [run.settings.shard for run in runs] == ["1/2", "2/2"]
    with pytest.raises(UserError, match="holds a run with other settings:\n  shard: 1/2 in the run, 2/2 now\n"):
        plan_run(replace(options, shard=Shard(2, 2), output_dir=runs[0].location))
    with pytest.raises(UserError, match="  shard: 1/2 in the run, the default now\n"):
        plan_run(replace(options, output_dir=runs[0].location))
    assert plan_run(replace(options, shard=Shard(1, 2), output_dir=runs[0].location)).run_id == runs[0].run_id


def test_a_shard_without_questions_is_refused(options: RunOptions) -> None:
    empty = next(n for n in range(1, 100) if not any(Shard(n, 99).holds(question(0, f"{i}.png")) for i in range(6)))
    with pytest.raises(UserError, match=rf"--shard {empty}/99: none of the 12 questions is in it, as an image's"):
        plan_run(replace(options, shard=Shard(empty, 99)))
    assert not Path(options.output_dir).exists()


def test_a_run_from_before_there_were_shards_is_the_same_run(options: RunOptions) -> None:
    run = plan_run(options)
    path = run.output_dir / ".run" / "run.json"
    body = json.loads(path.read_text())
    assert (body.pop("shard"), body.pop("merged")) == (None, [])
    path.write_text(json.dumps(body))
    assert plan_run(options).run_id == run.run_id
    with pytest.raises(UserError, match="  shard: the default in the run, 1/2 now"):
        plan_run(replace(options, shard=Shard(1, 2)))


@pytest.mark.parametrize("text", ["0/8", "x", "1/0"])
def test_a_run_json_has_a_shard_or_none(text: str) -> None:
    with pytest.raises(UserError, match="shard"):
        RunSettings.decode(json.dumps(json.loads(make_settings().model_dump_json()) | {"shard": text}).encode(), "run.json")


def test_check_looks_at_the_shard_alone(options: RunOptions) -> None:
    run = plan_run(replace(options, shard=Shard(1, 2)))
    held = sum(piece.size for piece in Run.open(run.location).slices)
    found = check(replace(options, shard=Shard(1, 2), output_dir="other"), decode=False, sample=0, cache_dir=None)
    assert (found.questions, 0 < held < 12) == (held, True)


@pytest.mark.parametrize("name", ["check", "enqueue", "run"])
def test_the_commands_take_it(options: RunOptions, name: str) -> None:
    line = (options.source.path, "--images-dir", options.images_dir, "--output-dir", options.output_dir)
    result = command("producer", name, *line, "--shard", "9/8", HALP_ENGINE="fake:0")
    assert (result.returncode, result.stderr) == (
        2, "error: --shard 9/8: give the shard's number, from 1 on, and how many there are, as in 2/8\n",
    )  # fmt: skip
