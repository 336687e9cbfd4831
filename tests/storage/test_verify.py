"""`storage verify` finds every kind of damage, `storage inspect` shows a part; both fail with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from storage import cli
from storage.hdf5.layout import open_part
from storage.hdf5.part import write_part
from storage.runs.pack import _describe, pack
from storage.runs.run import Run
from storage.runs.verify import verify
from storage.sample import Sample
from tests.support.builders import make_questions, make_run, make_sample, make_settings, stage

FIRST, SECOND = (f"qwen25vl_7b_embeddings_part_00{part}.h5" for part in (1, 2))


@pytest.fixture
def run(tmp_path) -> Run:
    """A finished run of two parts, a failure in each."""
    run = make_run(tmp_path / "out", 6)
    for part in (1, 2):
        stage(run, part, failed=[part])
        pack(run, part)
    return run


def findings(run: Run) -> list[str]:
    return [str(finding) for finding in verify(Run.open(run.output_dir))]


def publish_by_hand(tmp_path: Path, change: Callable[[Sample], Sample], *, without: int | None = None) -> Run:
    """Return a run whose part holds changed samples and whose sidecar describes just that."""
    run = make_run(tmp_path / "out", 3)
    samples = [
        (question, change(make_sample(question)) if question.question_id == "q2" else make_sample(question))
        for sequence, question in enumerate(run.questions(1))
        if sequence != without
    ]
    write_part(run.part_path(1), run.settings, run.model_facts(), 1, samples, [])
    _describe(run, 1)
    return run


def with_vectors(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Sample], Sample]:
    return lambda sample: replace(sample, vectors=change(dict(sample.vectors)))


# Finished and unfinished runs


def test_nothing_is_wrong_with_a_finished_run(run):
    assert findings(run) == []


def test_nothing_is_wrong_with_odd_ids(tmp_path):
    questions = [replace(q, question_id=i) for q, i in zip(make_questions(5), ["a/b", "..", "", "%2F", "日本"])]
    run = make_run(tmp_path, questions, checkpoint_interval=5)
    stage(run, 1, failed=[1])
    pack(run, 1)
    assert findings(run) == []


def test_an_unpublished_part_is_found(tmp_path):
    run = make_run(tmp_path, 5)
    stage(run, 1)
    pack(run, 1)
    assert findings(run) == [f"{SECOND}: is not published yet (2 questions)"]


def test_an_empty_plan_is_found(tmp_path):
    run = Run.create(tmp_path, make_settings())
    [finding] = findings(run)
    assert "nothing is planned" in finding


def test_a_lost_sidecar_is_found_and_comes_back(run):
    run.store.delete(run.sidecar_key(1))
    assert findings(run) == [f"{FIRST}: has no sidecar yet: the collector writes it at its next sweep"]
    pack(run, 1)
    assert findings(run) == []


# Damage to a published file


def test_a_truncated_part_is_found(run):
    path = run.part_path(1)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert findings(run) == [f"{FIRST}: has {size - 1} bytes; it was published with {size}"]


def test_an_extended_part_is_found(run):
    with run.part_path(2).open("ab") as file:
        file.write(b"\0")
    [finding] = findings(run)
    assert finding.startswith(f"{SECOND}: has ")


@pytest.mark.parametrize("where", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.9999])
def test_a_flipped_bit_is_found_without_opening_the_file(run, monkeypatch, where):
    path = run.part_path(1)
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 16
    path.write_bytes(data)
    opened = []
    monkeypatch.setattr("storage.runs.verify.open_part", lambda path: opened.append(path) or open_part(path))
    run.store.delete(".run/parts/002.json")
    run.part_path(2).unlink()
    assert findings(run) == [
        f"{FIRST}: its content is not what was published (SHA-256)",
        f"{SECOND}: is not published yet (3 questions)",
    ]
    assert opened == []


def test_a_zeroed_page_is_found(run):
    path = run.part_path(1)
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)
    assert findings(run) == [f"{FIRST}: its content is not what was published (SHA-256)"]


def test_a_missing_part_is_found(run):
    run.part_path(2).unlink()
    assert findings(run) == [f"{SECOND}: was published and is gone"]


def test_two_swapped_parts_are_found(run):
    first, second = run.part_path(1), run.part_path(2)
    first.rename(first.with_suffix(".x"))
    second.rename(first)
    first.with_suffix(".x").rename(second)
    assert [finding.split(":")[0] for finding in findings(run)] == [FIRST, SECOND]


@pytest.mark.parametrize("name", ["copy.h5", "qwen25vl_7b_embeddings_part_003.h5", "qwen25vl_7b_embeddings_part_01.h5"])
def test_a_stray_file_that_readers_would_take_is_found(run, name):
    (run.output_dir / name).write_bytes(b"")
    assert findings(run) == [f"{name}: is not a part of this run, but readers will take it for one"]


def test_other_files_are_no_findings(run):
    (run.output_dir / "failures.csv").write_text("")
    (run.output_dir / "notes.h5.txt").write_text("")
    assert findings(run) == []


# Content that was wrong when it was published


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda v: {**v, "vision_only_representation": np.full(8, np.nan, np.float32)},
            "has values that are not finite",
        ),
        (
            lambda v: {**v, "vision_only_representation": np.full(8, -np.inf, np.float32)},
            "has values that are not finite",
        ),
        (lambda v: {**v, "vision_only_representation": np.zeros(7, np.float32)}, "is float32 (7,), not float32 (8,)"),
        (lambda v: {**v, "vision_only_representation": np.zeros(6, np.float32)}, "is float32 (6,), not float32 (8,)"),
        (lambda v: {k: x for k, x in v.items() if k != "vision_only_representation"}, "is missing"),
    ],
    ids=["NaN", "infinity", "too narrow", "the encoder's width", "missing"],
)
def test_a_vector_that_is_not_whole_is_found(tmp_path, change, problem):
    [finding] = findings(publish_by_hand(tmp_path, with_vectors(change)))
    assert finding.startswith(f"{FIRST}, question q2: vision_only_representation {problem}")


def test_a_vector_of_two_dimensions_is_found(tmp_path):
    two = np.zeros((1, 8), np.float32)
    [finding] = findings(publish_by_hand(tmp_path, with_vectors(lambda v: {**v, "vision_only_representation": two})))
    assert finding == (f"{FIRST}: is not a part of this layout: q2/vision_only_representation has 2 dimensions, not one")


def test_one_bad_value_in_one_layer_is_found(tmp_path):
    def change(vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = "query_token_representation/layer_3"
        vectors[name] = vectors[name].copy()
        vectors[name][-1] = np.nan
        return vectors

    [finding] = findings(publish_by_hand(tmp_path, with_vectors(change)))
    what = f"{FIRST}, question q2: query_token_representation/layer_3 has values that are not finite"
    assert finding == f"{what}: the model's weights or the run's dtype make them, so computing it again would give the same"


def test_every_missing_vector_is_named(tmp_path):
    run = publish_by_hand(tmp_path, lambda sample: Sample({}, sample.answer, sample.facts))
    names = sorted(make_sample(make_questions(1)[0]).vectors)
    assert sorted(findings(run)) == [f"{FIRST}, question q2: {name} is missing" for name in names]


def test_vectors_without_a_record_of_the_model_are_found(run):
    run.store.delete(".run/model.json")
    assert {finding.split(": ")[1] for finding in findings(run)} == {
        "the run has vectors, but no record of the model (.run/model.json)"
    }


def test_a_question_that_is_neither_written_nor_failed_is_found(tmp_path):
    run = publish_by_hand(tmp_path, lambda sample: sample, without=2)
    assert findings(run) == [f"{FIRST}, question q3: is planned, but neither written nor failed"]


def rewrite_sidecar(run: Run, part: int, **changes: object) -> None:
    path = run.store.path(run.sidecar_key(part))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_question_that_is_there_twice_is_found(run):
    failures = json.loads(run.store.get(run.sidecar_key(1)))["failures"]
    rewrite_sidecar(run, 1, failures=[*failures, failures[0] | {"question_id": "q1"}])
    assert findings(run) == [f"{FIRST}, question q1: is there once more than it is planned"]


def test_a_question_that_was_never_planned_is_found(run):
    rewrite_sidecar(run, 1, question_ids=["q1", "q3", "q77"])
    assert findings(run) == [
        f"{FIRST}, question q77: is there once more than it is planned",
        f"{FIRST}: its groups are not the questions that its sidecar lists",
    ]


# The command line


@dataclass
class Output:
    code: int
    out: str
    err: str


@pytest.fixture
def storage(monkeypatch, capsys) -> Callable[..., Output]:
    """Return the command line in this process, with what it prints; an exception that reaches the user fails the test."""

    def call(*arguments: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["storage", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Output(exit_.value.code or 0, captured.out, captured.err)

    return call


def test_verify_succeeds(run, storage):
    assert storage("verify", run.output_dir) == Output(
        0, "6 planned = 4 written + 2 failed + 0 not published; no problem found\n", ""
    )


def test_verify_fails_with_a_line_for_each_problem(run, storage):
    run.part_path(2).unlink()
    (run.output_dir / "copy.h5").touch()
    output = storage("verify", run.output_dir)
    assert output.code == 1
    assert output.out == "6 planned = 4 written + 2 failed + 0 not published; 2 problems\n"
    assert output.err.splitlines() == [
        f"{SECOND}: was published and is gone",
        "copy.h5: is not a part of this run, but readers will take it for one",
        "To compute the damaged parts again: producer enqueue vqa.csv --images-dir /images"
        f" --output-dir {run.output_dir} … --repair",
    ]


def test_verify_of_an_unfinished_run(tmp_path, storage):
    run = make_run(tmp_path, 6)
    stage(run, 1)
    pack(run, 1)
    output = storage("verify", tmp_path)
    assert (output.code, output.out) == (1, "6 planned = 3 written + 0 failed + 3 not published; 1 problems\n")


def test_verify_as_json(run, storage):
    output = storage("verify", run.output_dir, "--json")
    assert (output.code, output.err) == (0, "")
    body = json.loads(output.out)
    assert body["ok"] is True
    assert (body["planned"], body["written"], body["failed"], body["outstanding"]) == (6, 4, 2, 0)
    assert body["reasons"] == {"image_missing": 2}
    assert body["findings"] == []

    run.part_path(2).unlink()
    output = storage("verify", "--json", run.output_dir)
    assert (output.code, output.err) == (1, "")
    body = json.loads(output.out)
    assert body["ok"] is False
    assert body["findings"] == [
        {"file": SECOND, "question_id": None, "problem": "was published and is gone", "part": 2, "unread": False}
    ]


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_verify_of_what_is_no_run(tmp_path, storage, kind):
    path = tmp_path / "it"
    if kind == "empty":
        path.mkdir()
    elif kind == "a file":
        path.write_bytes(b"")
    assert storage("verify", path) == Output(2, "", f"error: {path} holds no run: there is no .run/run.json in it\n")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (".run/run.json", "another version"),
        (".run/parts/001.json", "the same `producer enqueue … --repair` computes its part again"),
        ("the plan", "slice 1 was changed after it was written"),
    ],
)
def test_verify_of_a_run_whose_own_files_are_damaged(run, storage, key, message):
    path = run.store.path(run.slice(1).key if key == "the plan" else key)
    path.write_bytes(path.read_bytes()[:-5])
    output = storage("verify", run.output_dir)
    assert (output.code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert str(path) in output.err
    assert message in output.err


def test_inspect_shows_the_part(run, storage):
    output = storage("inspect", run.part_path(1))
    assert (output.code, output.err) == (0, "")
    for shown in ("Qwen/Qwen2.5-VL-7B-Instruct", "bfloat16", "2 of 2 questions", "answer to q3", "question q1",
                  "vision_only_representation", "query_token_representation/layer_3", "[8]"):  # fmt: skip
        assert shown in output.out


def test_inspect_shows_one_question(run, storage):
    output = storage("inspect", run.part_path(1), "--question", "q3", "--rows", "1")
    assert output.code == 0
    assert "question q3" in output.out
    assert "1 of 2 questions" in output.out


def test_inspect_as_json(run, storage):
    output = storage("inspect", run.part_path(1), "--json", "--question", "q3")
    assert output.code == 0
    body = json.loads(output.out)
    assert body["attributes"]["num_samples"] == 2
    assert body["attributes"]["layers"] == [0, 1, 3]
    assert [failure["question_id"] for failure in body["attributes"]["failures"]] == ["q2"]
    assert body["questions"] == {
        f"q{n}": {
            "question": f"What is in image {(n - 1) // 2}, seen for the {n}th time?",
            "image_id": f"image_{(n - 1) // 2}.jpg",
            "answer": f"answer to q{n}",
            "ground_truth_answer": f"truth {n}",
        }
        for n in (1, 3)
    }
    sample = make_sample(make_questions(3)[2])
    assert body["selected"]["question_id"] == "q3"
    assert body["selected"]["attributes"]["csv_row"] == 3
    assert {d["name"] for d in body["selected"]["datasets"]} == set(sample.vectors)
    for dataset in body["selected"]["datasets"]:
        values = sample.vectors[dataset["name"]].astype(np.float64)
        assert dataset["shape"] == [len(values)]
        assert dataset["dtype"] == "float32"
        assert dataset["finite"] is True
        np.testing.assert_allclose(
            [dataset[name] for name in ("mean", "std", "minimum", "maximum", "norm")],
            [values.mean(), values.std(), values.min(), values.max(), np.linalg.norm(values)],
        )


ODD = ["a/b", "..", "", "%2F", "日本", "[/b]", ":smile:"]


@pytest.fixture
def odd(tmp_path) -> Path:
    """A part of odd ids, with texts that rich would take for markup."""
    texts = ["[/b]", "[red]x", ":smile:", "\\[", "a\x1b[31mb", "x\ny", "日本"]
    questions = [
        replace(q, question_id=i, question=text, extra={"note": "[/i]"})
        for q, i, text in zip(make_questions(len(ODD)), ODD, texts, strict=True)
    ]
    run = make_run(tmp_path / "[out]", questions, checkpoint_interval=len(ODD))
    stage(run, 1)
    pack(run, 1)
    return run.part_path(1)


@pytest.mark.parametrize("question_id", ODD)
def test_inspect_takes_and_shows_any_id_and_any_text(odd, storage, question_id):
    output = storage("inspect", odd, "--question", question_id)
    assert output.code == 0
    for shown in ("a/b", "%2F", "日本", "[/b]", ":smile:", "[red]x", "note=[/i]", f"question {question_id}"):
        assert shown in output.out
    body = json.loads(storage("inspect", odd, "--question", question_id, "--json").out)
    assert body["selected"]["question_id"] == question_id
    assert set(body["questions"]) == set(ODD)


def test_inspect_of_a_part_of_failures_alone(tmp_path, storage):
    run = make_run(tmp_path, 3)
    stage(run, 1, failed=[0, 1, 2])
    pack(run, 1)
    assert "0 of 0 questions" in storage("inspect", run.part_path(1)).out
    assert json.loads(storage("inspect", run.part_path(1), "--json").out)["selected"] is None
    output = storage("inspect", run.part_path(1), "--question", "q1")
    assert (output.code, output.err) == (2, f"error: {run.part_path(1)} holds no question 'q1'; it has 0\n")


def test_inspect_of_values_that_are_not_finite(tmp_path, storage):
    change = with_vectors(lambda v: {**v, "vision_only_representation": np.full(8, np.nan, np.float32)})
    run = publish_by_hand(tmp_path, change)
    assert "NOT FINITE" in storage("inspect", run.part_path(1), "--question", "q2").out


def test_inspect_of_a_part_of_the_reference_script(tmp_path, storage):
    path = tmp_path / FIRST
    with h5py.File(path, "w") as file:
        file.attrs["model_name"] = "Qwen/Qwen2.5-VL-7B-Instruct"
        group = file.create_group("question_1")
        group.create_dataset("question", data="What?")
        group.create_dataset("vision_only_representation", data=np.zeros(4, np.float32), compression="gzip")
    output = storage("inspect", path)
    assert output.code == 0
    assert "What?" in output.out
    assert "vision_only_representation" in output.out


@pytest.mark.parametrize("kind", ["missing", "a directory", "empty", "text", "truncated", "another HDF5 file"])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_inspect_of_what_is_no_part(run, tmp_path, storage, kind, as_json):
    path = tmp_path / "it.h5"
    if kind == "a directory":
        path.mkdir()
    elif kind == "another HDF5 file":
        with h5py.File(path, "w") as file:
            file["values"] = np.arange(3)
    elif kind != "missing":
        part = run.part_path(1).read_bytes()
        path.write_bytes({"empty": b"", "text": b"question_id,image_id\n", "truncated": part[: len(part) // 2]}[kind])
    output = storage("inspect", path, *as_json)
    reason = {
        "missing": "no such file",
        "a directory": "there is no *.h5 in it",
        "another HDF5 file": "is not a part of this layout",
    }.get(kind, "not a readable HDF5 file")
    assert (output.code, output.out) == (2, "")
    assert output.err.startswith((f"error: {path}: {reason}", f"error: {path} {reason}"))


def test_inspect_of_an_unknown_question(run, storage):
    path = run.part_path(1)
    assert storage("inspect", path, "--question", "q9") == Output(
        2, "", f"error: {path} holds no question 'q9'; it has 2, the first is 'q1'\n"
    )


@pytest.mark.parametrize("arguments", [["verify"], ["inspect"], ["inspect", "x.h5", "--rows", "0"], ["nonsense"], []])
def test_wrong_usage(storage, arguments):
    assert storage(*arguments).code == 2


def test_the_installed_commands(run):
    """In processes of their own: what a script sees."""
    for line in ([sys.executable, "-m", "storage.cli"], [Path(sys.executable).parent / "storage"]):
        done = subprocess.run([*line, "verify", run.output_dir], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        done = subprocess.run([*line, "verify", run.output_dir / "no"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")


def test_describing_twice_is_the_same(run):
    """The sidecar is a function of the published file alone."""
    before = run.store.get(run.sidecar_key(1))
    run.store.delete(run.sidecar_key(1))
    _describe(run, 1)
    assert run.store.get(run.sidecar_key(1)) == before
