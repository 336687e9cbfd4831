"""Adding rows to a run: exactly the new questions are planned, in parts of their own; what was there stays as it is."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
import pytest
from PIL import Image

import producer
import storage
from producer.appending import append
from producer.dataset.selection import Shard
from producer.options import RunOptions, run_options
from producer.planning import plan_run
from producer.retrying import plan_retry
from storage.errors import UserError
from storage.images.lookup import EMBEDDED
from storage.runs import plan
from storage.runs.account import Bookkeeper
from storage.runs.failures import published_failures
from storage.runs.merge import merge
from storage.runs.run import Run
from storage.runs.verify import verify
from storage.views.report import write_report
from tests.support.builders import make_facts, stage
from tests.support.processes import command, write_csv
from workers.collect import collector
from workers.collect.collector import collect_run

SABOTAGE = Path(__file__).parents[1] / "support" / "sabotage"
Row = dict[str, str]


def row(number: int, image: int | None = None, **changes: str) -> Row:
    image_id = f"{number % 3 if image is None else image}.png"
    return {"question_id": f"q{number}", "image_id": image_id, "question": f"Why {number}?", "answer": f"a{number}"} | changes


ROWS = [row(number) for number in range(7)]
# Of an image that there was and two new ones, in turns; one of them stands before the earlier rows.
MORE = [row(7, 3), *ROWS, row(8, 4), row(9, 3), row(10, 0), row(11, 4)]
NEW = [["q7", "q9", "q10"], ["q8", "q11"]]  # an image's together, in slices of three


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunOptions:
    """A planned run of seven questions; its model is a name, and nothing is fed."""
    monkeypatch.setenv("HALP_ENGINE", "fake:0")
    monkeypatch.setattr(collector, "feed", lambda run, published=None: 0)
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (40, 30), (number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
    fields: dict[str, Any] = {"images_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "out")}
    found = run_options(table_of(tmp_path, ROWS), checkpoint_interval=3, **fields)
    finish(plan_run(found))
    return found


def table_of(place: Path, rows: Sequence[Row], name: str = "vqa.csv") -> Path:
    return write_csv(place / name, rows)


def grown(options: RunOptions, rows: Sequence[Row], **changes: Any) -> RunOptions:
    """Return the options with which the table has got other rows, and --append."""
    write_csv(options.source.path, rows)
    return replace(options, **{"append": True} | changes)


def finish(run: Run, failed: Sequence[int] = ()) -> None:
    run.pin_model(make_facts())
    for piece in run.slices:
        if piece.part not in run.parts_with_sidecar():
            stage(run, piece.part, failed=failed)
    assert collect_run(run)


def planned(run: Run) -> list[list[str]]:
    return [[question.question_id for question in run.questions(piece.part)] for piece in run.slices]


def test_only_the_new_questions_are_planned_with_an_images_together(options: RunOptions) -> None:
    before = planned(Run.open(options.output_dir))
    parts = {path: path.read_bytes() for path in Path(options.output_dir).glob("*.h5")}
    run = plan_run(grown(options, MORE))
    assert planned(run) == [*before, *NEW]
    assert not run.is_finished()
    assert [q.csv_row for q in run.questions(4)] == [1, 10, 11]  # rows of the new table
    finish(run)
    assert (run.is_finished(), Bookkeeper(run).account().written) == (True, 12)
    assert [str(finding) for finding in verify(Run.open(options.output_dir), deep=True)] == []
    assert all(path.read_bytes() == content for path, content in parts.items())
    loaded = storage.load(options.output_dir, "vision_only_representation")
    assert sorted(loaded.ids) == sorted(r["question_id"] for r in MORE)


def test_a_part_names_the_table_that_its_questions_are_of(options: RunOptions) -> None:
    first = sha256(options.source.path.read_bytes()).hexdigest()
    run = plan_run(grown(options, MORE))
    second = sha256(options.source.path.read_bytes()).hexdigest()
    finish(run, failed=(0,))
    plan_retry(run)
    finish(run)
    digests = []
    for path in sorted(Path(options.output_dir).glob("*.h5")):
        with h5py.File(path) as file:
            digests.append(file.attrs["dataset_sha256"])
    assert digests == [first] * 3 + [second] * 3
    assert Run.open(options.output_dir).settings.dataset_sha256 == first
    assert Run.open(options.output_dir).settings_by().dataset_sha256 == second


def test_a_second_call_does_nothing_more_and_the_command_without_append_goes_on(options: RunOptions) -> None:
    more = grown(options, MORE)
    finish(plan_run(more))
    names = sorted(path.name for path in Path(options.output_dir).rglob("*"))
    for again in (more, replace(more, append=False)):
        run = plan_run(again)
        assert (len(run.slices), run.is_finished()) == (5, True)
    assert sorted(path.name for path in Path(options.output_dir).rglob("*")) == names
    write_csv(options.source.path, ROWS)
    with pytest.raises(UserError, match="holds a run with other settings:\n  the CSV's content"):
        plan_run(options)
    with pytest.raises(UserError, match=r"5 questions changed or gone:\n  question 'q7': it is not in the table"):
        plan_run(replace(options, append=True))


def test_rows_are_added_again_and_again_and_to_a_run_that_is_not_finished(options: RunOptions) -> None:
    plan_run(grown(options, MORE))
    run = plan_run(grown(options, [*MORE, row(12)]))
    assert planned(run)[3:] == [*NEW, ["q12"]]
    finish(run)
    assert Bookkeeper(run).account().written == 13
    assert [piece.generation for piece in run.slices] == [0, 0, 0, 1, 1, 2]


def test_failed_questions_among_the_new_ones_are_retried(options: RunOptions) -> None:
    run = plan_run(grown(options, MORE))
    finish(run, failed=(0,))
    account = Bookkeeper(run).account()
    assert (account.planned, account.written, account.failed) == (12, 10, 2)
    assert [failed.failure.question_id for failed in published_failures(run)] == ["q7", "q8"]
    retry = plan_retry(run)
    assert (retry.questions, retry.parts) == (2, (6,))
    finish(run)
    account = Bookkeeper(run).account()
    assert (account.planned, account.written, account.failed) == (12, 12, 0)
    assert [str(finding) for finding in verify(run)] == []
    run = plan_run(grown(options, [*MORE, row(12)]))
    finish(run)
    assert Bookkeeper(run).account().written == 13


def test_a_table_without_new_questions_is_noted(options: RunOptions, tmp_path: Path) -> None:
    """A shard that has none of the new rows is of the same table as the others, which it is merged with."""
    begun = Run.open(options.output_dir)
    more = grown(options, list(reversed(ROWS)))
    run = plan_run(more)
    assert (run.slices, run.next_generation, run.is_finished()) == (begun.slices, 2, False)
    finish(run)
    assert run.is_finished()
    for again in (more, replace(more, append=False)):
        assert plan_run(again).next_generation == 2
    assert run.settings_by().dataset_sha256 == sha256(options.source.path.read_bytes()).hexdigest()
    run = plan_run(grown(options, MORE))
    finish(run, failed=(0,))
    assert plan_retry(run).generation == 3
    finish(run)
    assert planned(run)[3:] == [*NEW, ["q7", "q8"]]
    assert [str(finding) for finding in verify(run, deep=True)] == []


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (MORE[:2] + MORE[3:], "'q1': it is not in the table, or not among the rows that are taken"),
        ([row(0, question="How?"), *MORE[2:]], "'q0': its question was 'Why 0?' and is 'How?'"),
        ([row(0, image=5), *MORE[2:]], "'q0': its image was '0.png' and is '5.png'"),
        ([row(0, answer="b"), *MORE[2:]], "'q0': its answer was 'a0' and is 'b'"),
    ],
)
def test_an_earlier_question_that_is_another_one_is_refused_by_name(options: RunOptions, rows: list[Row], fault: str) -> None:
    with pytest.raises(UserError, match="1 question changed or gone:") as caught:
        plan_run(grown(options, rows))
    assert f"  question {fault}\n" in str(caught.value)
    assert len(Run.open(options.output_dir).slices) == 3


def test_a_further_column_is_another_table(options: RunOptions) -> None:
    with pytest.raises(UserError, match=r"7 questions changed or gone:\n  question 'q0': its column 'kind' is new\n"):
        plan_run(grown(options, [r | {"kind": "x"} for r in MORE]))


def test_the_refusal_without_the_option_names_it(options: RunOptions) -> None:
    with pytest.raises(UserError, match=r"Has the table got further questions\? With --append they are computed too"):
        plan_run(grown(options, MORE, append=False))
    assert len(Run.open(options.output_dir).slices) == 3


def test_a_larger_limit_takes_further_rows(options: RunOptions, tmp_path: Path) -> None:
    other = replace(options, output_dir=str(tmp_path / "other"), limit=4)
    finish(plan_run(other))
    with pytest.raises(UserError, match=r"limit: 4 in the run, the default now\n.*--append"):
        plan_run(replace(other, limit=None))
    run = plan_run(replace(other, limit=None, append=True))
    assert sum(map(len, planned(run))) == 7
    assert plan_run(replace(other, limit=None)).run_id == run.run_id
    assert run.settings_by().limit is None


def test_a_shard_takes_its_share_of_the_new_rows(options: RunOptions, tmp_path: Path) -> None:
    rows = [row(number, number % 6) for number in range(6)]
    rows += [row(number, 0) for number in range(6, 9)]  # all in one shard
    found: list[str] = []
    for number in (1, 2):
        sharded = replace(options, output_dir=str(tmp_path / f"s{number}"), shard=Shard(number, 2))
        finish(plan_run(grown(sharded, rows[:6], append=False)))
        finish(plan_run(grown(sharded, rows)))
        found += [question_id for piece in planned(Run.open(sharded.output_dir)) for question_id in piece]
    assert sorted(found) == sorted(r["question_id"] for r in rows)
    merged = merge([str(tmp_path / "s1"), str(tmp_path / "s2")], str(tmp_path / "whole")).run
    assert [str(finding) for finding in verify(merged, deep=True)] == []
    assert sorted(i for piece in planned(merged) for i in piece) == sorted(found)
    assert merged.settings.dataset_sha256 == sha256(options.source.path.read_bytes()).hexdigest()


def test_calls_that_cannot_be_meant_are_refused(options: RunOptions, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--append: .*/none holds no run: the first command begins it without"):
        plan_run(replace(options, append=True, output_dir=str(tmp_path / "none")))
    with pytest.raises(UserError, match="holds a run with other settings:\n  order: image in the run, csv now"):
        plan_run(grown(options, MORE, order="csv"))
    shutil.rmtree(Path(options.output_dir) / ".run" / "plan")
    with pytest.raises(UserError, match=r"--append: .* is not planned yet: give the command first that it was begun with"):
        plan_run(replace(options, append=True))


def test_a_plan_without_room_for_the_parts_is_refused(options: RunOptions) -> None:
    run = Run.open(options.output_dir)
    run.settings = run.settings.model_copy(update={"part_digits": 1, "checkpoint_interval": 1})
    with pytest.raises(UserError, match=r"--append would make part 10, but the parts of .* have numbers of 1 digits"):
        append(run, [replace(run.questions(1)[0], question_id=f"n{number}") for number in range(7)], run.settings)
    assert len(Run.open(options.output_dir).slices) == 3


def test_something_else_that_is_planned_at_the_same_moment_wins(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.appending.write_generation", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"something else was planned in .* at the same moment: give the command again"):
        plan_run(grown(options, MORE))


def test_an_earlier_version_refuses_the_plan(options: RunOptions) -> None:
    """It would take the new questions for retried ones; `slices` is what it needs of each generation."""
    run = plan_run(grown(options, MORE))
    assert "slices" in json.loads(run.store.get(".run/plan/000.json"))
    assert "slices" not in json.loads(run.store.get(".run/plan/001.json"))
    with pytest.raises(plan.DamagedError, match="it has no slices"):
        run.store.put(".run/plan/001.json", b'{"generation": 1}')
        Run.open(options.output_dir).refresh()


def test_images_that_lie_in_the_table(options: RunOptions, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in sorted((tmp_path / "images").iterdir())]
    frame = pd.DataFrame([{**row(n), "image": {"bytes": data[n % 2], "path": None}} for n in range(4)]).drop(columns="image_id")
    more = pd.DataFrame([{**row(n), "image": {"bytes": data[n % 4], "path": None}} for n in range(9)]).drop(columns="image_id")
    more.loc[:3, "image"] = frame["image"]

    def of(frame: pd.DataFrame, **changes: Any) -> RunOptions:
        source = replace(options.source, frame=frame)
        return replace(options, source=source, images_dir=None, output_dir=str(tmp_path / "frame"), **changes)

    finish(plan_run(of(frame)))
    run = plan_run(of(more, append=True))
    finish(run)
    assert len(run.store.list(EMBEDDED)) == 4
    assert Bookkeeper(run).account().written == 9
    changed = more.copy()
    changed.at[0, "image"] = {"bytes": data[5], "path": None}
    with pytest.raises(UserError, match="question 'q0': its image was "):
        plan_run(of(changed, append=True))
    assert len(run.store.list(EMBEDDED)) == 4  # a refused table leaves nothing


def test_a_run_in_an_object_store(options: RunOptions, s3_url: str) -> None:
    there = replace(options, output_dir=s3_url)
    finish(plan_run(there))
    run = plan_run(grown(there, MORE))
    finish(run)
    assert planned(run)[3:] == NEW
    assert [str(finding) for finding in verify(Run.open(s3_url))] == []


def test_the_report_names_the_table_as_it_is_now(options: RunOptions) -> None:
    run = plan_run(grown(options, MORE))
    finish(run)
    write_report(run)
    assert sha256(options.source.path.read_bytes()).hexdigest() in (run.output_dir / "report.html").read_text()


# By the commands


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run in out/, its table, and the one that has grown."""
    place = tmp_path_factory.mktemp("computed")
    (place / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (40, 30), (number, 9, 9)).save(place / "images" / f"{number}.png")
    table_of(place, ROWS)
    table_of(place, MORE, "more.csv")
    result = run_there(place, "vqa.csv")
    assert result.returncode == 0, result.stderr
    return place


def run_there(place: Path, table: str, *more: str, **variables: str) -> Any:
    options = ("--images-dir", place / "images", "--output-dir", place / "out", "--checkpoint-interval", 3)
    return command("producer", "run", place / table, *options, *more, HALP_ENGINE="fake:0", **variables)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["plan.before:1", "plan.after:1"])
def test_killed_before_or_after_the_plan_the_same_command_goes_on(computed: Path, tmp_path: Path, point: str) -> None:
    place = tmp_path / "here"
    shutil.copytree(computed, place)
    (place / "images").rename(place / "moved")
    (place / "images").symlink_to(computed / "images")
    options = ("--append", "--relocate")
    path = os.pathsep.join([str(SABOTAGE), os.environ.get("PYTHONPATH", "")])
    killed = run_there(place, "more.csv", *options, PYTHONPATH=path, SABOTAGE_KILL_AT=point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_there(place, "more.csv", *options)
    assert again.returncode == 0, again.stderr
    assert "12 of 12 questions written into 5 parts" in again.stdout
    assert command("storage", "verify", place / "out", "--deep").returncode == 0
    assert planned(Run.open(place / "out"))[3:] == NEW


@pytest.mark.slow
def test_layers_are_added_beside_a_run_by_the_command_that_the_refusal_names(computed: Path, tmp_path: Path) -> None:
    refused = run_there(computed, "vqa.csv", "--layers", "1,2", "--max-new-tokens", "7")
    assert refused.returncode == 2
    assert "  layers: the default in the run, (1, 2) now\n" in refused.stderr
    [line] = [line.strip() for line in refused.stderr.splitlines() if line.startswith("  producer run ")]
    assert line == (
        f"producer run {computed}/vqa.csv --images-dir {computed}/images --layers 1,2 --max-new-tokens 7 "
        f"--checkpoint-interval 3 --output-dir {computed}/out-2"
    )
    beside = command(*line.split(), HALP_ENGINE="fake:0")
    assert beside.returncode == 0, beside.stderr
    assert Run.open(computed / "out-2").settings.layers == (1, 2)


@pytest.mark.slow
def test_status_and_report_count_them(
    computed: Path, tmp_path: Path, storage_command: Callable[..., tuple[int, str, str]]
) -> None:
    place = tmp_path / "here"
    shutil.copytree(computed, place)
    with (place / "more.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["q99", "9.png", "Of an image that is not there?", ""])
    options = ("--append", "--relocate")
    result = run_there(place, "more.csv", *options)
    assert result.returncode == 1, result.stderr
    assert "q99: image_missing" in result.stderr
    status = command("producer", "status", place / "out", "--json")
    assert {name: json.loads(status.stdout)[name] for name in ("planned", "written", "failed")} == {
        "planned": 13, "written": 12, "failed": 1,
    }  # fmt: skip
    assert storage_command("report", place / "out")[0] == 0
    Image.new("RGB", (40, 30)).save(place / "images" / "9.png")
    assert command("producer", "retry", place / "out", HALP_BROKER_URL="redis://127.0.0.1:1/0").returncode == 0
    result = run_there(place, "more.csv", *options)
    assert (result.returncode, "13 of 13 questions written into 6 parts" in result.stdout) == (0, True), result.stderr


@pytest.mark.slow
def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALP_ENGINE", "fake:0")
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
    place: dict[str, Any] = {"images_dir": tmp_path / "images", "output_dir": tmp_path / "out", "progress": False}
    held = pd.DataFrame(MORE)
    counts = [producer.run(pd.DataFrame(ROWS), **place).written, producer.run(held, append=True, **place).written]
    assert counts == [7, 12]
    with pytest.raises(UserError, match="--shard 3/2: give the shard's number"):
        producer.run(held, shard="3/2", **place)
