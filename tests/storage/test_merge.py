"""Merging: one verified run of the parts of several, bit by bit, or a refusal that says why; whole or absent after a kill."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest

import storage
from producer.dataset.selection import Shard
from producer.retrying import plan_retry
from storage.errors import UserError
from storage.images.lookup import EMBEDDED
from storage.question import Question
from storage.runs import merge as merging
from storage.runs.account import Bookkeeper
from storage.runs.merge import merge
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.runs.verify import verify
from tests.support.builders import make_facts, make_questions, make_run, stage
from tests.support.processes import command
from tests.support.s3_server import S3Server
from workers.collect import collector
from workers.collect.collector import collect_run
from workers.queue.feed import feed

SABOTAGE = Path(__file__).parents[1] / "support" / "sabotage"
QUESTIONS = make_questions(20)


def finished(place: Path, questions: Sequence[Question], failed: Sequence[int] = (), **changes: Any) -> Run:
    """Return a run whose parts are published; of the first one some questions have failed."""
    changes = {"run_id": place.name} | changes
    run = make_run(place, questions, **changes)
    for piece in run.slices:
        stage(run, piece.part, failed=failed if piece.part == 1 else ())
        assert pack(run, piece.part)
    return run


def shard(place: Path, number: int, **changes: Any) -> Run:
    held = [question for question in QUESTIONS if Shard(number, 2).holds(question)]
    return finished(place, held, **{"shard": f"{number}/2", "images_dir": f"/images-{number}"} | changes)


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Both shards of twenty questions, as two machines computed them; in the first one two questions have failed."""
    shard(tmp_path / "a", 1, failed=(0, 2))
    shard(tmp_path / "b", 2)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def read_plainly(directory: Path) -> dict[str, dict[str, Any]]:
    """Return all questions with their vectors, by h5py alone, as a reader in the wild does."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.h5")):
        with h5py.File(path) as file:
            for key, group in file.items():
                assert key not in found
                found[key] = {"image": group["image_id"].asstr()[()], "vector": group["vision_only_representation"][:].tolist()}
    return found


def test_the_shards_of_a_table_become_one_verified_run(two: list[str], tmp_path: Path) -> None:
    before = [files(Path(place)) for place in two]
    merged = merge(two, str(tmp_path / "out"))
    run = Run.open(tmp_path / "out")
    assert merged.newly
    assert [str(finding) for finding in verify(run, deep=True)] == []
    account = Bookkeeper(run).account()
    assert (account.planned, account.written, account.failed, account.finished) == (20, 18, 2, True)
    assert run.is_finished()
    assert not run.has_leftovers()
    parts = [path for place in two for path in sorted(Path(place).glob("*.h5"))]
    assert [p.read_bytes() for p in sorted((tmp_path / "out").glob("*.h5"))] == [p.read_bytes() for p in parts]
    assert all(path.samefile(other) for path, other in zip(sorted((tmp_path / "out").glob("*.h5")), parts, strict=True))
    assert read_plainly(tmp_path / "out") == read_plainly(tmp_path / "a") | read_plainly(tmp_path / "b")
    with (tmp_path / "out" / "failures.csv").open(newline="") as file:
        rows = {row["question_id"]: (row["reason"], row["part"]) for row in csv.DictReader(file)}
    assert rows == dict.fromkeys(_ids(two[0], part=1)[:3:2], ("image_missing", "1"))
    assert [(m.run_id, m.location, m.shard) for m in run.settings.merged] == [("a", two[0], "1/2"), ("b", two[1], "2/2")]
    assert run.settings.shard is None
    assert [files(Path(place)) for place in two] == before
    assert not list(tmp_path.glob(".*"))


def _ids(place: str, part: int) -> list[str]:
    return [question.question_id for question in Run.open(place).questions(part)]


def test_every_reader_takes_it(two: list[str], tmp_path: Path, storage_command: Callable[..., tuple[int, str, str]]) -> None:
    out = tmp_path / "out"
    code, printed, _ = storage_command("merge", *two, "--output-dir", out)
    parts = sum(len(Run.open(place).slices) for place in two)
    assert (code, printed) == (0, f"20 questions, 2 failed in {parts} parts, merged: {out}\n")
    code, printed, _ = storage_command("merge", *two, "--output-dir", out, "--json")
    assert (code, json.loads(printed)["newly_merged"], json.loads(printed)["written"]) == (0, False, 18)
    assert storage_command("verify", out)[:2] == (
        0, "20 planned = 18 written + 2 failed + 0 not published; no problem found\n",
    )  # fmt: skip
    assert storage_command("report", out)[0] == 0
    assert "shard 1/2" in (out / "report.html").read_text()
    assert storage_command("inspect", out, "--json")[0] == 0
    assert storage_command("export", out, "--to", "csv", "--output", tmp_path / "answers.csv")[0] == 0
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 19
    assert storage_command("diff", out, out)[0] == 0
    loaded = storage.load(out, "query_token_representation", layer=1)
    assert sorted(loaded.ids) == sorted(read_plainly(out))


def test_probe_takes_it(tmp_path: Path, storage_command: Callable[..., tuple[int, str, str]]) -> None:
    questions = make_questions(80)
    for name, held in (("a", questions[:40]), ("b", questions[40:])):
        finished(tmp_path / name, held)
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    labels = "".join(f"q{n},{str(n % 3 == 0).lower()}\n" for n in range(1, 81))
    (tmp_path / "labels.csv").write_text(f"question_id,wrong\n{labels}")
    code, _, err = storage_command("probe", tmp_path / "out", "--labels", tmp_path / "labels.csv", "--no-mlp", "--json")
    assert code == 0, err
    assert (tmp_path / "out" / "probe.json").exists()


# What is refused


def test_equal_ids_are_refused_by_name(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", QUESTIONS[:6]), finished(tmp_path / "b", QUESTIONS[4:])
    expected = rf"2 questions are in several of these runs.*\n  'q5' in {a.location} and in {b.location}\n  'q6' in "
    with pytest.raises(UserError, match=expected):
        merge([a.location, b.location], str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "float32"}, "dtype: bfloat16 in {a}, float32 in {b}"),
        ({"max_new_tokens": 5}, "max_new_tokens: 64 in {a}, 5 in {b}"),
        ({"dataset_sha256": "1" * 64}, "the table's content (SHA-256): 0"),
        ({"prompt": "{question} {A}"}, "prompt: {question} in {a}, {question} {A} in {b}"),
        ({"prompt": "{question}", "prompt_columns": True}, "prompt_columns: False in {a}, True in {b}"),
        ({"model_digest": "1" * 12}, "model_digest: 000000000000 in {a}, 111111111111 in {b}"),
        ({"model": make_facts(config_sha256="9" * 64)}, "config_sha256: 1111"),
        ({"model": make_facts(layers=(0, 2))}, "layers: (0, 1, 3) in {a}, (0, 2) in {b}"),
    ],
)
def test_runs_of_another_kind_are_refused_with_what_differs(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    a, b = finished(tmp_path / "a", QUESTIONS[:4]), finished(tmp_path / "b", QUESTIONS[4:], **changes)
    with pytest.raises(UserError, match="these runs differ in what they compute") as caught:
        merge([a.location, b.location], str(tmp_path / "out"))
    assert said.replace("{a}", a.location).replace("{b}", b.location) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_where_things_lie_and_how_a_table_is_cut_may_differ(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", QUESTIONS[:4], order="csv", limit=4, software_version="0.0.9")
    moved = {"images_dir": "s3://bucket/images", "image_roots": ("/more",), "model_slug": "qwen25vl_mine"}
    b = finished(tmp_path / "b", QUESTIONS[4:], checkpoint_interval=9, **moved)
    run = merge([a.location, b.location], str(tmp_path / "out")).run
    assert (run.settings.limit, run.settings.checkpoint_interval) == (None, 9)
    assert len(read_plainly(tmp_path / "out")) == 20


def test_what_is_not_finished_is_refused(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", QUESTIONS[:4]), make_run(tmp_path / "b", QUESTIONS[4:], run_id="b")
    stage(b, 1)
    pack(b, 1)
    with pytest.raises(UserError, match=rf"only finished runs can be merged:\n  {b.location} has 13 of 16 questions to go"):
        merge([a.location, b.location], str(tmp_path / "out"))
    a.part_path(1).unlink()
    with pytest.raises(UserError, match=r"a: qwen25vl_7b_embeddings_part_001\.h5 was published and is gone\n  .*b has 13"):
        merge([a.location, b.location], str(tmp_path / "out"))


def test_calls_that_cannot_be_meant_are_refused(two: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="name two runs at least"):
        merge(two[:1], out)
    with pytest.raises(UserError, match="holds no run"):
        merge([two[0], str(tmp_path / "none")], out)
    shutil.copytree(two[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"/a and .*/copy are one run: name each once"):
        merge([two[0], str(tmp_path / "copy")], out)
    with pytest.raises(UserError, match="holds something else: choose another one"):
        merge(two, two[0])
    with pytest.raises(UserError, match="an object store gives no name to many objects at once: name a directory"):
        merge(two, "s3://bucket/out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_part_is_refused_and_nothing_is_kept(two: list[str], tmp_path: Path) -> None:
    part = Run.open(two[1]).part_path(2)
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"not every part is sound:\n  {part}: its content is not what was published"):
        merge(two, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# What is computed later


def test_nothing_is_computed_in_a_merged_run(two: list[str], tmp_path: Path) -> None:
    run = merge(two, str(tmp_path / "out")).run
    with pytest.raises(UserError, match=rf"is merged of other runs: retry in those \({two[0]}, {two[1]}\)"):
        plan_retry(run)


def test_retries_and_merged_runs_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a question that was planned twice the later part counts, in a run that is merged of a merged one too."""
    monkeypatch.setattr(collector, "feed", lambda run, published=None: 0)
    a = finished(tmp_path / "a", QUESTIONS[:5], failed=(0, 1, 2))
    for healed in (2, 1):  # at the first retry one of them succeeds, at the second another one
        retry = plan_retry(a)
        stage(a, retry.parts[0], failed=range(1, 1 + healed))
        assert collect_run(a)
    b, c = finished(tmp_path / "b", QUESTIONS[5:10], failed=(1,)), finished(tmp_path / "c", QUESTIONS[10:])
    first = merge([a.location, b.location], str(tmp_path / "first")).run
    second = merge([c.location, first.location], str(tmp_path / "second")).run
    for run, planned in ((first, 10), (second, 20)):
        account = Bookkeeper(run).account()
        assert (account.planned, account.written, account.failed) == (planned, planned - 2, 2)
        assert [str(finding) for finding in verify(run, deep=True)] == []
    assert [member.run_id for member in second.settings.merged] == ["c", "a", "b"]
    assert second.slices[-1].origin == ("a", 4)
    assert read_plainly(tmp_path / "second").keys() == {q.question_id for q in QUESTIONS} - {"q3", "q7"}


def test_a_lost_sidecar_is_written_again(two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "feed", lambda run, published=None: 0)
    run = merge(two, str(tmp_path / "out")).run
    sidecar = tmp_path / "out" / run.sidecar_key(len(run.slices))
    data = sidecar.read_bytes()
    sidecar.unlink()
    assert "has no sidecar yet" in str(next(verify(run)))
    assert collect_run(run)
    assert json.loads(sidecar.read_bytes()) == json.loads(data)
    assert [str(finding) for finding in verify(Run.open(tmp_path / "out"))] == []


def test_a_part_that_is_gone_is_merged_again_and_not_computed(
    two: list[str], tmp_path: Path, storage_command: Callable[..., tuple[int, str, str]]
) -> None:
    run = merge(two, str(tmp_path / "out")).run
    run.part_path(2).unlink()
    code, _, err = storage_command("verify", tmp_path / "out")
    assert code == 1
    assert err.endswith(f"To merge the damaged parts again: storage merge {two[0]} {two[1]} --output-dir …\n")
    (tmp_path / "out" / run.sidecar_key(2)).unlink()
    assert feed(Run.open(tmp_path / "out")) == 0  # without a look at Redis, of which there is none here


def test_images_of_the_table_are_carried(tmp_path: Path) -> None:
    for name, held in (("a", QUESTIONS[:4]), ("b", QUESTIONS[4:])):
        run = finished(tmp_path / name, held, embedded_images=True)
        run.store.put_new(f"{EMBEDDED}/both.png", b"both")
        run.store.put_new(f"{EMBEDDED}/{name}.png", name.encode())
    run = merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out")).run
    assert {name: run.store.get(f"{EMBEDDED}/{name}") for name in run.store.list(EMBEDDED)} == {
        "a.png": b"a", "b.png": b"b", "both.png": b"both",
    }  # fmt: skip
    assert run.images.images_dir == str(tmp_path / "out")


def test_without_hard_links_the_parts_are_copied(two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Any, target: Any, **options: Any) -> None:
        if str(target).endswith(".h5"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        original(source, target, **options)

    original = os.link
    monkeypatch.setattr(os, "link", link)
    (tmp_path / ".out.merging").mkdir()
    copied = Path(shutil.copy(Run.open(two[0]).part_path(1), tmp_path / ".out.merging")).stat()  # by a call that was killed
    run = merge(two, str(tmp_path / "out")).run
    assert os.path.samestat(run.part_path(1).stat(), copied)
    assert not run.part_path(2).samefile(Run.open(two[0]).part_path(2))
    assert run.part_path(2).read_bytes() == Run.open(two[0]).part_path(2).read_bytes()
    assert [str(finding) for finding in verify(run)] == []
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_run_in_an_object_store_is_fetched(two: list[str], tmp_path: Path, s3_url: str, s3_server: S3Server) -> None:
    for name, content in files(Path(two[0])).items():
        s3_server.write(f"{s3_url}/{name}", content)
    run = merge([s3_url, two[1]], str(tmp_path / "out")).run
    assert [str(finding) for finding in verify(run, deep=True)] == []
    assert len(read_plainly(tmp_path / "out")) == 18


# Killed


@pytest.mark.parametrize(
    "point",
    [
        "take.before:1",
        "take.after:3",
        "describe.before:1",
        "describe.after:4",
        "finish.before:1",
        "merge.before:1",
        "merge.after:1",
    ],
)
def test_killed_at_any_point_the_same_command_finishes(two: list[str], tmp_path: Path, point: str) -> None:
    out, line = tmp_path / "out", ("storage", "merge", *two, "--output-dir", tmp_path / "out")
    path = os.pathsep.join([str(SABOTAGE), os.environ.get("PYTHONPATH", "")])
    killed = command(*line, PYTHONPATH=path, SABOTAGE_KILL_AT=point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert out.exists() == (point == "merge.after:1")
    again = command(*line)
    assert again.returncode == 0, again.stderr
    assert [str(finding) for finding in verify(Run.open(out), deep=True)] == []
    assert len(read_plainly(out)) == 18
    assert not list(tmp_path.glob(".*"))


def test_two_calls_at_once_do_not_mix(two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    refused: list[str] = []

    def at_the_end(phase: str) -> None:
        if phase == "verifying":
            with pytest.raises(UserError, match=r"another `storage merge` is at work on .*/\.out\.merging") as caught:
                merge(two, out)
            refused.append(str(caught.value))

    assert merge(two, out, at_the_end).newly
    assert len(refused) == 1


def test_what_another_merge_has_left_is_not_taken(two: list[str], tmp_path: Path) -> None:
    left = tmp_path / ".out.merging"
    left.mkdir()
    (left / "another_embeddings_part_001.h5").write_bytes(b"another")
    (left / f"{Run.open(two[0]).part_name(1)}.partial").write_bytes(b"half")
    (left / Run.open(two[0]).part_name(1)).write_bytes(b"cut")
    run = merge(two, str(tmp_path / "out")).run
    assert [str(finding) for finding in verify(run)] == []
    assert merging.is_run(run.location)
