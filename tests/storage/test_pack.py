"""Packing: a slice becomes a part, whole, once, whatever happens. Parts are read back with bare h5py and h5dump."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage.runs.pack
import storage.stores.store
from storage.errors import DamagedError, UserError
from storage.hdf5.part import QUESTION_ATTRIBUTES, read_header, write_part
from storage.naming import group_key
from storage.question import Question
from storage.runs.pack import pack, read_sidecar
from storage.runs.run import Run
from storage.runs.verify import verify
from storage.sample import Sample
from storage.stores.store import DirectoryStore
from tests.support.builders import MODEL, make_facts, make_failure, make_questions, make_run, make_sample, stage

TEXTS = {"question", "image_id", "answer", "ground_truth_answer"}
ODD_IDS = [
    "a/b",
    "",
    ".",
    "..",
    "%2F",
    "%",
    "日本",
    "50%_off",
    "🦆",
    " ",
    "é",
    "e\u0301",
    "a\nb",
    "x" * 512,
    "0001",
    "1",
]
LAYERS = {"layer_0", "layer_1", "layer_3"}
FILE = "qwen25vl_7b_embeddings_part_001.h5"


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "out", 7)


def text(dataset: h5py.Dataset) -> str:
    value = dataset[()]
    assert isinstance(value, bytes)
    return value.decode("utf-8")


def bits(values: np.ndarray) -> bytes:
    return np.asarray(values, dtype=np.float32).tobytes()


def top(run: Run) -> list[str]:
    return sorted(path.name for path in run.output_dir.iterdir() if path.name != ".run")


def leftovers(run: Run) -> list[str]:
    below = run.output_dir / ".run"
    return sorted(str(p.relative_to(below)) for d in ("tmp", "staging") for p in (below / d).rglob("*") if p.is_file())


def written_ids(run: Run) -> Counter[str]:
    """Return how often each question is in the parts, read without our own reader."""
    ids: Counter[str] = Counter()
    for path in sorted(run.output_dir.glob("*.h5")):
        with h5py.File(path, "r") as file:
            ids.update(text(group["question"]) for group in file.values())
            ids.update(f"failed {failure['question_id']}" for failure in json.loads(file.attrs["failures"]))
    return ids


def assert_sound(run: Run) -> None:
    """Assert that the whole run is published and that nothing is left over."""
    run = Run.open(run.output_dir)
    run.store.delete_partials(older_than=-1)
    assert [str(finding) for finding in verify(run)] == []
    assert leftovers(run) == []
    assert top(run) == [run.part_name(piece.part) for piece in run.slices]
    assert run.parts_with_sidecar() == {piece.part for piece in run.slices}


def pack_one(tmp_path: Path, question: Question, sample: Sample) -> Path:
    run = make_run(tmp_path / "out", [question])
    run.stage_sample(1, 0, sample)
    assert pack(run, 1)
    return run.part_path(1)


# Complete slices only


def test_an_incomplete_slice_is_not_packed(run):
    assert pack(run, 1) is False
    stage(run, 1, failed=[0], skipped=[2])
    assert pack(run, 1) is False
    assert top(run) == []
    assert leftovers(run) == ["staging/001/000000.json", "staging/001/000001.safetensors"]
    assert run.parts_with_sidecar() == set()


def test_a_complete_slice_is_published_described_and_cleaned_up(run):
    stage(run, 2)
    assert pack(run, 2) is True
    assert top(run) == ["qwen25vl_7b_embeddings_part_002.h5"]
    assert leftovers(run) == []
    assert run.parts_with_sidecar() == {2}
    assert not (run.output_dir / ".run/staging/002").exists()


def test_the_last_slice_may_be_short(run):
    for part in (1, 2, 3):
        stage(run, part)
        assert pack(run, part) is True
    assert written_ids(run) == Counter(question.question for question in make_questions(7))
    assert_sound(run)


def test_a_published_part_is_never_touched_again(run):
    stage(run, 1)
    pack(run, 1)
    before = run.part_path(1).stat()
    stage(run, 1)  # a second computation of every question
    assert leftovers(run) == []
    assert pack(run, 1) is True
    after = run.part_path(1).stat()
    assert (before.st_ino, before.st_mtime_ns, before.st_nlink) == (after.st_ino, after.st_mtime_ns, 1)


# The layout, as the documentation of the reference script has it


@pytest.fixture
def part(tmp_path) -> Path:
    questions = make_questions(3, extra={"category": "日本", "split": "val", "empty": ""})
    run = make_run(tmp_path / "out", questions)
    stage(run, 1)
    pack(run, 1)
    return run.part_path(1)


def test_the_file_has_the_documented_name(part):
    assert part.name == FILE


def test_the_root_holds_the_questions_and_nothing_else(part):
    with h5py.File(part, "r") as file:
        assert list(file) == ["q1", "q2", "q3"]
        assert all(isinstance(node, h5py.Group) for node in file.values())


def test_the_root_attributes(part):
    with h5py.File(part, "r") as file:
        attributes = dict(file.attrs)
        assert attributes["model_name"] == MODEL
        assert attributes["model_type"] == "qwen2.5-vl-7b-instruct"
        assert attributes["device"] == "cpu"
        assert attributes["dtype"] == "bfloat16"
        assert attributes["num_samples"] == 3
        assert np.issubdtype(attributes["num_samples"].dtype, np.integer)
        assert attributes["created_at"].startswith("20")
        assert attributes["part"] == 1
        assert list(attributes["layers"]) == [0, 1, 3]
        assert json.loads(attributes["failures"]) == []
        for name, value in attributes.items():
            if isinstance(value, str):
                assert h5py.check_string_dtype(file.attrs.get_id(name).dtype) == ("utf-8", None)


def test_a_group_has_the_documented_members(part):
    with h5py.File(part, "r") as file:
        for group in file.values():
            vectors = {"vision_only_representation", "vision_encoder_representation"}
            groups = {"vision_token_representation", "query_token_representation"}
            assert set(group) == TEXTS | vectors | groups
            assert {tuple(sorted(group[name])) for name in groups} == {tuple(sorted(LAYERS))}


def test_strings_are_variable_length_utf8_scalars(part):
    with h5py.File(part, "r") as file:
        for number, question in enumerate(make_questions(3), start=1):
            group = file[question.question_id]
            for name in TEXTS:
                assert h5py.check_string_dtype(group[name].dtype) == ("utf-8", None)
                assert group[name].shape == ()
            assert text(group["question"]) == question.question
            assert text(group["image_id"]) == question.image_id
            assert text(group["answer"]) == f"answer to q{number}"
            assert text(group["ground_truth_answer"]) == f"truth {number}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_vectors_are_one_dimensional_float32_with_the_computed_values(tmp_path, dtype):
    run = make_run(tmp_path, 3, dtype=dtype)
    stage(run, 1)
    pack(run, 1)
    with h5py.File(run.part_path(1), "r") as file:
        assert file.attrs["dtype"] == dtype
        for question in make_questions(3):
            vectors = make_sample(question, dtype=dtype).vectors
            assert len(vectors) == 8
            for name, vector in vectors.items():
                dataset = file[question.question_id][name]
                assert (dataset.dtype, dataset.shape) == (np.float32, vector.shape)
                assert bits(dataset[:]) == bits(vector)
                if dtype == "bfloat16":
                    assert not (dataset[:].view(np.uint32) & 0xFFFF).any()


def test_every_bfloat16_value_is_exact(tmp_path):
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    question = make_questions(1)[0]
    path = pack_one(tmp_path, question, Sample({"vision_only_representation": every}, "", {}))
    with h5py.File(path, "r") as file:
        stored = file["q1/vision_only_representation"][:]
    finite = np.isfinite(every.astype(np.float32))
    np.testing.assert_array_equal(stored.view(np.uint32)[finite] >> 16, every.view(np.uint16)[finite])
    np.testing.assert_array_equal(np.isfinite(stored), finite)


def test_other_columns_and_provenance_are_attributes_of_the_group(part):
    with h5py.File(part, "r") as file:
        attributes = dict(file["q2"].attrs)
    assert {name: attributes[name] for name in ("category", "split", "empty")} == {
        "category": "日本",
        "split": "val",
        "empty": "",
    }
    assert attributes["question_id"] == "q2"
    assert attributes["csv_row"] == 2
    assert attributes["seq_len"] == 40
    assert list(attributes["image_grid_thw"]) == [1, 4, 6]
    assert attributes["finish_reason"] == "eos"


def test_the_names_that_a_column_must_not_have_are_those_we_write(part):
    with h5py.File(part, "r") as file:
        assert set(file["q1"].attrs) - {"category", "split", "empty"} <= QUESTION_ATTRIBUTES


def test_the_root_lists_the_distinct_environments(tmp_path):
    run = make_run(tmp_path, 3)
    for sequence, (device, gpu) in enumerate([("cuda", "H100"), ("cuda", "A100"), ("cpu", "")]):
        run.stage_sample(1, sequence, make_sample(run.questions(1)[sequence], device=device, gpu=gpu))
    pack(run, 1)
    with h5py.File(run.part_path(1), "r") as file:
        assert (file.attrs["device"], file.attrs["gpu"]) == ("cpu, cuda", "A100, H100")
        assert "device" not in file["q1"].attrs


@pytest.mark.parametrize("options", [["-H"], []], ids=["header", "all"])
def test_h5dump_reads_it(tmp_path, options):
    assert shutil.which("h5dump"), "h5dump is not installed: apt-get install hdf5-tools"
    run = make_run(tmp_path, odd_questions(), checkpoint_interval=len(ODD_IDS))
    stage(run, 1, failed=[0])
    pack(run, 1)
    done = subprocess.run(["h5dump", *options, run.part_path(1)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert b'GROUP "50%_off"' in done.stdout
    assert b"H5T_IEEE_F32LE" in done.stdout


# Texts and ids


def odd_questions() -> list[Question]:
    return [replace(question, question_id=text) for question, text in zip(make_questions(len(ODD_IDS)), ODD_IDS, strict=True)]


def test_odd_ids_are_escaped_only_where_needed_and_kept_in_an_attribute(tmp_path):
    run = make_run(tmp_path, odd_questions(), checkpoint_interval=len(ODD_IDS))
    stage(run, 1)
    pack(run, 1)
    with h5py.File(run.part_path(1), "r") as file:
        assert sorted(group.attrs["question_id"] for group in file.values()) == sorted(ODD_IDS)
        assert len(file) == len(ODD_IDS)
        for question in odd_questions():
            group = file[group_key(question.question_id)]
            assert text(group["question"]) == question.question
            assert bits(group["query_token_representation/layer_3"][:]) == bits(
                make_sample(question).vectors["query_token_representation/layer_3"]
            )
        for ordinary in ("日本", "50%_off", "🦆", "é", "e\u0301", " ", "a\nb", "0001", "1"):
            assert ordinary in set(file)
    assert sorted(read_sidecar(run, 1).question_ids) == sorted(ODD_IDS)
    assert_sound(run)


@pytest.mark.parametrize(
    ("answer", "stored"),
    [
        ("", ""),
        (" ", " "),
        ("日本 🦆 é", "日本 🦆 é"),
        ("two\nlines\r\n\ttab", "two\nlines\r\n\ttab"),
        ("before\0after", "before\ufffdafter"),
        ("\0", "\ufffd"),
        ("x" * 3_000_000, "x" * 3_000_000),
    ],
    ids=["empty", "blank", "unicode", "lines", "NUL inside", "NUL alone", "very long"],
)
def test_answers(tmp_path, answer, stored):
    question = make_questions(1)[0]
    path = pack_one(tmp_path, question, make_sample(question, answer=answer))
    with h5py.File(path, "r") as file:
        assert text(file["q1/answer"]) == stored


def test_long_attributes(tmp_path):
    question = replace(make_questions(1)[0], extra={"context": "日本" * 100_000})
    ids = list(range(32_768))
    sample = make_sample(question, answer_token_ids=ids, answer_token_logprobs=[-0.5] * len(ids))
    path = pack_one(tmp_path, question, sample)
    with h5py.File(path, "r") as file:
        assert file["q1"].attrs["context"] == "日本" * 100_000
        assert list(file["q1"].attrs["answer_token_ids"]) == ids
        assert len(file["q1"].attrs["answer_token_logprobs"]) == len(ids)


# Characters that a CSV cannot bring are left out: NUL and surrogates are refused by `enqueue`.
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS, st.text(max_size=20)), max_size=5, unique_by=lambda row: row[0]),
    column=CELLS.filter(lambda name: name.strip() and name not in QUESTION_ATTRIBUTES),
)
def test_any_texts_come_back(tmp_path_factory, rows, column):
    path = tmp_path_factory.mktemp("part") / "part.h5"
    questions = [
        Question(question_id, image_id, question, truth, row, {column: truth})
        for row, (question_id, image_id, question, truth, _) in enumerate(rows, start=1)
    ]
    samples = [(q, make_sample(q, answer=answer)) for q, (*_, answer) in zip(questions, rows)]
    run_settings = make_run(path.parent / "run", 1).settings
    write_part(path, run_settings, make_facts(), 1, samples, [])
    with h5py.File(path, "r") as file:
        found = {
            group.attrs["question_id"]: (*(text(group[n]) for n in ("image_id", "question", "ground_truth_answer")),
                                         group.attrs[column], text(group["answer"]))
            for group in file.values()
        }  # fmt: skip
    assert found == {
        question_id: (image_id, question, truth, truth, answer.replace("\0", "\ufffd"))
        for question_id, image_id, question, truth, answer in rows
    }
    header = read_header(path)
    assert header is not None
    assert sorted(header.question_ids) == sorted(question_id for question_id, *_ in rows)


# Failures


def test_failures_are_in_the_root_attribute_and_in_the_sidecar(run):
    stage(run, 1, failed=[0, 2])
    pack(run, 1)
    q1, _, q3 = run.questions(1)
    with h5py.File(run.part_path(1), "r") as file:
        assert list(file) == ["q2"]
        assert file.attrs["num_samples"] == 1
        assert json.loads(file.attrs["failures"]) == [asdict(make_failure(q1)), asdict(make_failure(q3))]
    sidecar = read_sidecar(run, 1)
    assert sidecar.question_ids == ("q2",)
    assert sidecar.failures == (make_failure(q1), make_failure(q3))


@pytest.mark.parametrize("agreed", [True, False], ids=["after a worker loaded the model", "before any did"])
def test_a_slice_of_failures_alone_is_a_part_without_samples(tmp_path, agreed):
    run = make_run(tmp_path / "out", 3, agreed=agreed)
    stage(run, 1, failed=[0, 1, 2])
    assert pack(run, 1) is True
    with h5py.File(run.part_path(1), "r") as file:
        assert list(file) == []
        assert file.attrs["num_samples"] == 0
        assert [f["question_id"] for f in json.loads(file.attrs["failures"])] == ["q1", "q2", "q3"]
    assert_sound(run)


def test_a_staged_result_beats_a_staged_failure(run):
    stage(run, 1, failed=[0, 1])
    run.stage_sample(1, 1, make_sample(run.questions(1)[1]))
    pack(run, 1)
    with h5py.File(run.part_path(1), "r") as file:
        assert list(file) == ["q2", "q3"]
        assert [f["question_id"] for f in json.loads(file.attrs["failures"])] == ["q1"]


def test_many_long_failures_fit(tmp_path):
    run = make_run(tmp_path, 300, checkpoint_interval=300)
    for sequence, question in enumerate(run.questions(1)):
        run.stage_failure(1, sequence, make_failure(question, traceback="é" * 5000))
    pack(run, 1)
    with h5py.File(run.part_path(1), "r") as file:
        failures = json.loads(file.attrs["failures"])
    assert len(failures) == 300
    assert {len(failure["traceback"]) for failure in failures} == {5000}


def test_odd_characters_in_a_failure_do_not_stop_the_part(run):
    stage(run, 1, skipped=[0])
    message = "NUL \0, surrogate \udcff, 日本, ] } \" '"
    run.stage_failure(1, 0, make_failure(run.questions(1)[0], message=message))
    assert pack(run, 1) is True
    with h5py.File(run.part_path(1), "r") as file:
        [failure] = json.loads(file.attrs["failures"])
    assert failure["message"] == message.replace("\udcff", "?")


# A process killed at each step


def die(*_: Any) -> None:
    os._exit(9)


def opened(handle: int) -> Path:
    """Return what a handle has open."""
    return Path(os.readlink(f"/proc/self/fd/{handle}"))


def pack_and_die(output_dir: Path, step: str) -> None:
    run, patch = Run.open(output_dir), pytest.MonkeyPatch()
    if step == "the temporary file half written":

        def half(path: Path, *arguments: Any) -> None:
            write_part(path, *arguments)
            os.truncate(path, path.stat().st_size // 2)
            die()

        patch.setattr(storage.runs.pack, "write_part", half)
    elif step == "the temporary file written":
        patch.setattr(DirectoryStore, "publish", die)
    elif step == "published, the directory not flushed":
        fsync = os.fsync
        patch.setattr(os, "fsync", lambda handle: die() if opened(handle) == run.output_dir else fsync(handle))
    elif step == "published, not described":
        patch.setattr(storage.runs.pack, "_describe", die)
    elif step == "described, not cleaned up":
        patch.setattr(Run, "delete_staging", die)
    elif step == "half cleaned up":
        unlink = os.unlink
        patch.setattr(os, "unlink", lambda name, **at: (unlink(name, **at), name.endswith(".partial") or die()))
    pack(run, 1)
    os._exit(0)  # the step was not reached


@pytest.mark.parametrize(
    ("step", "published", "described", "staged"),
    [
        ("the temporary file half written", False, False, 3),
        ("the temporary file written", False, False, 3),
        ("published, the directory not flushed", True, False, 3),
        ("published, not described", True, False, 3),
        ("described, not cleaned up", True, True, 3),
        ("half cleaned up", True, True, 2),
    ],
)
def test_a_collector_killed_at_any_step_loses_and_repeats_nothing(tmp_path, step, published, described, staged):
    run = make_run(tmp_path / "out", 3)
    stage(run, 1, failed=[1])
    process = multiprocessing.get_context("spawn").Process(target=pack_and_die, args=(run.output_dir, step))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert top(run) == [FILE] * published
    assert run.parts_with_sidecar() == ({1} if described else set())
    assert len(run.staged(1)) == staged
    assert Run.open(run.output_dir).has_finished(1, 0)

    assert pack(Run.open(run.output_dir), 1) is True
    q1, q2, q3 = run.questions(1)
    assert written_ids(run) == Counter([q1.question, f"failed {q2.question_id}", q3.question])
    assert_sound(run)


@pytest.mark.parametrize("step", ["write_part", "sync", "_describe"])
def test_an_error_at_a_step_leaves_no_temporary_file_and_the_next_try_succeeds(run, monkeypatch, step):
    stage(run, 1)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(storage.runs.pack, step, fail)
        pack(run, 1)
    assert len(leftovers(run)) == 3
    assert pack(run, 1) is True
    assert written_ids(run) == Counter(question.question for question in run.questions(1))
    assert leftovers(run) == []


# Several processes at once

PARTS = 40


def pack_in_rounds(output_dir: Path, barrier, results) -> None:
    run = Run.open(output_dir)
    for part in range(1, PARTS + 1):
        barrier.wait(60)
        results.put(pack(run, part))


def test_two_collectors_at_once_publish_each_part_once(tmp_path):
    run = make_run(tmp_path / "out", 3 * PARTS)
    for part in range(1, PARTS + 1):
        stage(run, part, failed=[part % 4] if part % 4 < 3 else [])
    run_together(pack_in_rounds, pack_in_rounds, output_dir=run.output_dir, rounds=PARTS, parties=2)
    for part in range(1, PARTS + 1):
        assert pack(run, part) is True
    assert max(written_ids(run).values()) == 1
    assert sum(written_ids(run).values()) == 3 * PARTS
    assert_sound(run)


def stage_in_rounds(output_dir: Path, barrier, results) -> None:
    run = Run.open(output_dir)
    for part in range(1, PARTS + 1):
        barrier.wait(60)
        for _ in range(10):
            stage(run, part)
        results.put(True)


def test_late_second_computations_neither_fail_nor_leave_anything(tmp_path):
    run = make_run(tmp_path / "out", 3 * PARTS)
    for part in range(1, PARTS + 1):
        stage(run, part)
    run_together(pack_in_rounds, stage_in_rounds, output_dir=run.output_dir, rounds=PARTS, parties=2)
    assert written_ids(run) == Counter(question.question for question in make_questions(3 * PARTS))
    assert_sound(run)


@pytest.mark.parametrize("moment", ["before the link", "at the link", "after the link"])
def test_a_late_second_computation_whose_directory_is_removed_under_it(run, monkeypatch, moment):
    stage(run, 1)
    question, other = run.questions(1)[0], Run.open(run.output_dir)
    link, fsync = os.link, os.fsync
    staging = run.output_dir / ".run/staging/001"

    def overtaken_link(source: str, target: str, **handles: Any) -> None:
        if opened(handles["dst_dir_fd"]) == staging:
            monkeypatch.undo()
            if moment == "at the link":
                with pytest.raises(FileExistsError):
                    link(source, target, **handles)
            assert pack(other, 1) is True
            if moment == "at the link":
                raise FileExistsError(17, "File exists")
        link(source, target, **handles)

    def overtaken_fsync(handle: int) -> None:
        if opened(handle) == staging:
            monkeypatch.undo()
            assert pack(other, 1) is True
        fsync(handle)

    if moment == "after the link":
        run.store.delete(".run/staging/001/000000.safetensors")  # so that the link is made
        run.stage_failure(1, 0, make_failure(question))
        monkeypatch.setattr(os, "fsync", overtaken_fsync)
    else:
        monkeypatch.setattr(os, "link", overtaken_link)
    run.stage_sample(1, 0, make_sample(question))
    assert not staging.exists()
    assert sum(written_ids(run).values()) == 3
    assert leftovers(run) == []


def test_an_error_of_staging_before_the_part_is_published_is_raised(run, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space"):
        stage(run, 1)


def run_together(*targets: Any, output_dir: Path, rounds: int, parties: int) -> None:
    """Run each target in a process of its own, in lockstep; none may raise."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(parties), context.Queue()
    processes = [context.Process(target=target, args=(output_dir, barrier, results)) for target in targets]
    for process in processes:
        process.start()
    for _ in range(rounds * parties):
        results.get(timeout=60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_a_collector_that_another_one_overtakes_finds_the_part_published(run, monkeypatch):
    """The other one publishes and removes the staged files while this one reads them."""
    stage(run, 1)
    get, other = run.store.get, Run.open(run.output_dir)

    def overtaken(key: str, limit: int) -> bytes:
        if key.endswith("000001.safetensors"):
            assert pack(other, 1) is True
        return get(key, limit)

    monkeypatch.setattr(run.store, "get", overtaken)
    assert pack(run, 1) is True
    assert written_ids(run) == Counter(question.question for question in run.questions(1))
    assert leftovers(run) == []


def test_a_collector_that_another_one_overtakes_before_publishing_changes_nothing(run, monkeypatch):
    stage(run, 1)
    other, inodes = Run.open(run.output_dir), []

    def overtaken(*arguments: Any) -> None:
        write_part(*arguments)
        monkeypatch.setattr(storage.runs.pack, "write_part", write_part)
        assert pack(other, 1) is True
        inodes.append(run.part_path(1).stat().st_ino)

    monkeypatch.setattr(storage.runs.pack, "write_part", overtaken)
    assert pack(run, 1) is True
    assert [run.part_path(1).stat().st_ino] == inodes
    assert leftovers(run) == []


def test_a_collector_whose_damaged_file_another_one_removed_waits(run, monkeypatch):
    stage(run, 1)
    get, other = run.store.get, Run.open(run.output_dir)
    path = run.output_dir / ".run/staging/001/000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    def overtaken(key: str, limit: int) -> bytes:
        if key.endswith("000001.safetensors"):
            with pytest.raises(DamagedError):
                pack(other, 1)
        return get(key, limit)

    monkeypatch.setattr(run.store, "get", overtaken)
    assert pack(run, 1) is False
    assert top(run) == []


def test_a_missing_slice_of_the_plan_is_an_error_and_not_an_incomplete_slice(run):
    stage(run, 1)
    (run.output_dir / run.slice(1).key).unlink()
    with pytest.raises(FileNotFoundError):
        pack(Run.open(run.output_dir), 1)


# The sidecar


def test_a_lost_sidecar_is_written_again_identically(run):
    stage(run, 1, failed=[0])
    pack(run, 1)
    path = run.output_dir / ".run/parts/001.json"
    before = path.read_bytes()
    path.unlink()
    assert pack(run, 1) is True
    assert path.read_bytes() == before


def test_the_sidecar_describes_the_published_file(run):
    stage(run, 1, failed=[0])
    pack(run, 1)
    body = json.loads((run.output_dir / ".run/parts/001.json").read_bytes())
    assert (body["file"], body["part"], body["run_id"]) == (FILE, 1, run.run_id)
    assert body["size"] == run.part_path(1).stat().st_size
    digest = subprocess.run(["sha256sum", run.part_path(1)], capture_output=True, text=True, check=True).stdout
    assert digest.startswith(body["sha256"])
    assert body["question_ids"] == ["q2", "q3"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"failures": []}', b'{"failures": [{}]}', b"\xff"])
def test_a_damaged_sidecar_is_named(run, content):
    stage(run, 1)
    pack(run, 1)
    path = run.output_dir / ".run/parts/001.json"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"parts/001\.json is damaged .* --repair"):
        read_sidecar(run, 1)


# Damaged staged files


@pytest.mark.parametrize("sequence", [0, 1], ids=["a failure", "a result"])
def test_a_damaged_staged_file_is_removed_and_the_slice_incomplete_again(run, sequence):
    stage(run, 1, failed=[0])
    [path] = (run.output_dir / ".run/staging/001").glob(f"00000{sequence}.*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=rf"{path.name}.*removed"):
        pack(run, 1)
    assert not path.exists()
    assert top(run) == []
    assert len(leftovers(run)) == 2
    assert not run.has_finished(1, sequence)
    assert pack(run, 1) is False

    stage(run, 1, failed=[0])
    assert pack(run, 1) is True
    assert leftovers(run) == []


# Files that are not ours under the part's name


def foreign(kind: str, path: Path) -> None:
    if kind == "no HDF5":
        path.write_bytes(b"precious")
    elif kind == "empty":
        path.touch()
    elif kind == "the reference script's":
        with h5py.File(path, "w") as file:
            file.attrs["model_name"] = MODEL
    else:
        other = make_run(path.parent.parent / "other", 6, **({"run_id": "another"} if kind == "another run's" else {}))
        number = 2 if kind == "another slice's" else 1
        stage(other, number)
        pack(other, number)
        shutil.copy(other.part_path(number), path)


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("kind", ["no HDF5", "empty", "the reference script's", "another run's", "another slice's"])
def test_a_foreign_file_under_the_name_is_never_overwritten(tmp_path, monkeypatch, kind, moment):
    run = make_run(tmp_path / "out", 6)
    stage(run, 1)
    prepared = tmp_path / "prepared" / "file.h5"
    prepared.parent.mkdir()
    foreign(kind, prepared)
    if moment == "before":
        shutil.copy(prepared, run.part_path(1))
    else:

        def slowly(*arguments: Any) -> None:
            write_part(*arguments)
            shutil.copy(prepared, run.part_path(1))

        monkeypatch.setattr(storage.runs.pack, "write_part", slowly)
    for _ in range(2):
        what = "damaged, and was not described before" if kind == "empty" else "not part 1 of this run: move it elsewhere"
        with pytest.raises(UserError, match=f"{re.escape(FILE)} is {what}"):
            pack(run, 1)
    assert run.part_path(1).read_bytes() == prepared.read_bytes()
    assert len(leftovers(run)) == 3
    assert run.parts_with_sidecar() == set()

    run.part_path(1).unlink()
    monkeypatch.undo()
    assert pack(run, 1) is True
    assert written_ids(run) == Counter(question.question for question in run.questions(1))
