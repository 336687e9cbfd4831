"""Loading: the same values as bare h5py gives, in the asked order, with a frame; or a refusal that says why."""

from __future__ import annotations

import csv
import gc
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage
from producer.dataset.table import read_table
from storage.errors import DamagedError, UnfinishedWarning, UserError
from storage.hdf5.columns import COLUMN
from storage.hdf5.layout import open_part
from storage.hdf5.memory import uncollected
from storage.hdf5.part import write_part
from storage.hdf5.rows import ROWS
from storage.naming import part_number
from storage.question import Question
from storage.runs.pack import pack
from storage.runs.plan import write_generation
from storage.runs.run import Run
from storage.sample import Sample
from tests.support.builders import make_facts, make_questions, make_run, make_sample, make_settings, stage

QUERY, LAYER = "query_token_representation", 3
FIELD = f"{QUERY}/layer_{LAYER}"
VISION = "vision_only_representation"
REPAIR = "`producer enqueue … --repair`"


def shuffled(number: int) -> list[Question]:
    """Return questions whose plan is neither the CSV's order nor that of their ids."""
    questions = make_questions(number, extra={"category": "colour"})
    return [questions[(7 * k + 3) % number] for k in range(number)]


@pytest.fixture
def run(tmp_path) -> Run:
    """A finished run of ten questions in three parts, one of them failed."""
    run = make_run(tmp_path / "out", shuffled(10), checkpoint_interval=4)
    for part in (1, 2, 3):
        stage(run, part, failed=[0] if part == 2 else [])
        pack(run, part)
    return run


def bare(*paths: Path, field: str = FIELD) -> dict[str, np.ndarray]:
    """Return a field of some files by bare h5py, in the order of a loop over files and keys."""
    found = {}
    for path in paths:
        with h5py.File(path, "r") as file:
            for key in file:
                found[file[key].attrs.get("question_id", key)] = file[key][field][:]
    return found


def parts(run: Run) -> list[Path]:
    return sorted(run.output_dir.glob("*.h5"))


def check(loaded: storage.Loaded, expected: dict[str, np.ndarray]) -> None:
    assert sorted(loaded.ids) == sorted(expected)
    assert loaded.vectors.dtype == np.float32
    assert loaded.vectors.shape == (len(expected), len(next(iter(expected.values()))))
    for question_id, vector in zip(loaded.ids, loaded.vectors, strict=True):
        assert vector.tobytes() == expected[question_id].tobytes()
    assert loaded.frame["question_id"].tolist() == loaded.ids
    assert loaded.frame.index.tolist() == list(range(len(loaded.ids)))


def strip(path: Path, *names: str) -> None:
    """Remove root attributes of a part whose names start so: what an earlier version, or the reference script, wrote."""
    with h5py.File(path, "r+") as file:
        for name in [name for name in file.attrs if name.startswith(names)]:
            del file.attrs[name]
    describe_anew(path)


def describe_anew(path: Path) -> None:
    """Have the sidecar of a part say what size it has now."""
    sidecar = path.parent / ".run" / "parts" / f"{part_number(path.name):03d}.json"
    if sidecar.exists():
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"size": path.stat().st_size}))


def reference_file(path: Path, ids: list[str], **attributes: object) -> Path:
    """Write a file as the reference script does."""
    with h5py.File(path, "w") as file:
        file.attrs["model_name"] = "Qwen/Qwen2.5-VL-7B-Instruct"
        file.attrs.update(attributes)
        for number, question_id in enumerate(ids):
            group = file.create_group(question_id)
            for name in ("question", "image_id", "answer", "ground_truth_answer"):
                group.create_dataset(name, data=f"{name} {number}")
            data = np.full(4, number, np.float32)
            group.create_dataset(FIELD, data=data, compression="gzip", compression_opts=4)
    return path


# What is loaded


@pytest.mark.parametrize("field", [(QUERY, LAYER), (FIELD, None), (VISION, None), ("vision_encoder_representation", None)])
def test_every_value_is_that_of_bare_h5py(run, field):
    name = field[0] if field[1] is None else FIELD
    loaded = storage.load(run.output_dir, *field)
    check(loaded, bare(*parts(run), field=name))
    assert (loaded.field, loaded.missing) == (name, 0)


def test_orders(run):
    written = [q for part in (1, 2, 3) for q in run.questions(part)]
    del written[4]  # failed
    expected = {
        "plan": [q.question_id for q in written],
        "csv": [q.question_id for q in sorted(written, key=lambda q: q.csv_row)],
        "file": list(bare(*parts(run))),
    }
    assert len(set(map(tuple, expected.values()))) == 3
    for order, ids in expected.items():
        loaded = storage.load(run.output_dir, QUERY, LAYER, order=order)
        assert loaded.ids == ids
        check(loaded, bare(*parts(run)))
        assert storage.load_frame(run.output_dir, order=order).equals(loaded.frame)
    with pytest.raises(UserError, match="no such order: 'nonsense'"):
        storage.load(run.output_dir, QUERY, LAYER, order="nonsense")


def test_the_frame_has_what_a_part_knows_of_its_questions(run):
    frame = storage.load(run.output_dir, QUERY, LAYER, order="csv").frame
    row = frame.set_index("question_id").loc["q6"]
    assert row["image_id"] == "image_2.jpg"
    assert row["question"] == "What is in image 2, seen for the 6th time?"
    assert (row["answer"], row["ground_truth_answer"]) == ("answer to q6", "truth 6")
    assert (row["csv_row"], row["category"], row["finish_reason"], row["seq_len"]) == (6, "colour", "eos", 40)
    assert row["image_grid_thw"] == [1, 4, 6]
    [part] = [p for p in (1, 2, 3) if "q6" in {q.question_id for q in run.questions(p)}]
    assert row["part"] == part
    assert " ".join(frame.columns[:7]) == ("question_id image_id question answer ground_truth_answer csv_row part")


@pytest.mark.parametrize("stripped", [(ROWS,), (COLUMN,), (ROWS, COLUMN)], ids=str)
def test_a_part_without_index_or_rows_gives_the_same(run, stripped):
    expected = storage.load(run.output_dir, QUERY, LAYER)
    for path in parts(run)[1:]:
        strip(path, *stripped)
    loaded = storage.load(run.output_dir, QUERY, LAYER)
    assert loaded.ids == expected.ids
    assert loaded.vectors.tobytes() == expected.vectors.tobytes()
    columns = sorted(expected.frame.columns)
    assert sorted(loaded.frame.columns) == columns
    assert loaded.frame[columns].equals(expected.frame[columns])


def test_columns_are_chosen_by_name(run):
    loaded = storage.load(run.output_dir, QUERY, LAYER, columns=["answer", "category"])
    assert list(loaded.frame.columns) == ["answer", "category"]
    with pytest.raises(UserError, match=r"there is no column nonsense; there are question_id, image_id, .*category"):
        storage.load(run.output_dir, QUERY, LAYER, columns=["answer", "nonsense"])


@pytest.mark.parametrize("order", ["plan", "csv", "file"])
def test_vectors_and_ids_alone(run, order):
    whole, bare = (storage.load(run.output_dir, QUERY, LAYER, order=order, columns=c) for c in (None, []))
    assert bare.ids == whole.ids
    assert bare.vectors.tobytes() == whole.vectors.tobytes()
    assert bare.frame.shape == (len(whole.ids), 0)
    chunks = list(storage.iter_chunks(run.output_dir, QUERY, LAYER, columns=[]))
    assert [chunk.frame.shape for chunk in chunks] == [(len(chunk.ids), 0) for chunk in chunks]


@pytest.mark.parametrize("layers", [[3, 0], (1,), np.array([0, 1, 3])], ids=str)
def test_several_layers_have_an_axis(run, layers):
    loaded = storage.load(run.output_dir, QUERY, layers)
    assert (loaded.field, loaded.vectors.shape) == (QUERY, (9, len(layers), 8))
    for place, layer in enumerate(layers):
        assert loaded.vectors[:, place].tobytes() == storage.load(run.output_dir, QUERY, int(layer)).vectors.tobytes()
    chunks = list(storage.iter_chunks(run.output_dir, QUERY, layers))
    truth = storage.load(run.output_dir, QUERY, layers, order="file")
    assert np.concatenate([chunk.vectors for chunk in chunks]).tobytes() == truth.vectors.tobytes()
    dataset = storage.torch_dataset(run.output_dir, QUERY, layers)
    assert [item["vector"].numpy().tobytes() for item in dataset] == [row.tobytes() for row in truth.vectors]


def test_no_layer_is_refused(run):
    with pytest.raises(UserError, match=f"at which layers of {QUERY}"):
        storage.load(run.output_dir, QUERY, [])
    with pytest.raises(UserError, match=f"has no {QUERY}/layer_2"):
        storage.load(run.output_dir, QUERY, [0, 2])


def test_several_runs_are_read_one_after_the_other(run, tmp_path):
    later = [replace(q, question_id=f"later {q.question_id}") for q in shuffled(10)]
    second = make_run(tmp_path / "second", later, checkpoint_interval=5)
    stage(second, 2)
    assert pack(second, 2)
    with pytest.warns(UnfinishedWarning, match="second is not finished: 5 questions"):
        loaded = storage.load([run.output_dir, second.output_dir], QUERY, LAYER)
    first = storage.load(run.output_dir, QUERY, LAYER)
    assert loaded.ids == [*first.ids, *(q.question_id for q in second.questions(2))]
    check(loaded, bare(*parts(run), *parts(second)))
    assert loaded.missing == 5
    with pytest.raises(UserError, match="out is given twice"):
        storage.load([run.output_dir, run.output_dir], QUERY, LAYER)
    other = make_run(tmp_path / "other", later[:1], run_id="other", model=make_facts(layers=(0, 3)))
    stage(other, 1)
    assert pack(other, 1)
    with pytest.raises(UserError, match="these files hold different things and must not be mixed: for"):
        storage.load([run.output_dir, other.output_dir], QUERY, LAYER)


def test_what_is_loaded_is_shown_in_a_line(run):
    loaded = storage.load(run.output_dir, QUERY, LAYER)
    assert repr(loaded) == f"Loaded({FIELD!r}, vectors=float32 [9, 8], frame={len(loaded.frame.columns)} columns)"
    sample = next(storage.iter_samples(run.output_dir))
    assert repr(sample).startswith(f"StoredSample({sample.question_id!r}, question=")
    assert len(repr(sample)) < 600
    assert "array" not in repr(sample)


def test_a_csv_column_called_as_a_text_has_a_suffix(tmp_path):
    [question] = make_questions(1, extra={"ground_truth_answer": "another", "part": "verb"})
    path = tmp_path / "x_embeddings_part_001.h5"
    write_part(path, make_settings(), make_facts(), 1, [(question, make_sample(question))], [])
    for _ in range(2):
        [row] = storage.load_frame(path).to_dict("records")
        assert (row["ground_truth_answer"], row["ground_truth_answer_csv"]) == ("truth 1", "another")
        assert (row["part"], row["part_csv"]) == (1, "verb")
        strip(path, ROWS)


def test_files_of_the_reference_script(tmp_path):
    first = reference_file(tmp_path / "m_embeddings_part_001.h5", ["b", "a"])
    second = reference_file(tmp_path / "m_embeddings_part_002.h5", ["c"])
    for source in (tmp_path, str(tmp_path), [first, str(second)]):
        loaded = storage.load(source, QUERY, LAYER)
        assert loaded.ids == ["a", "b", "c"]
        check(loaded, bare(first, second))
        assert loaded.frame["question"].tolist() == ["question 1", "question 0", "question 0"]
        assert loaded.frame["part"].tolist() == [1, 1, 2]
    assert storage.load(first, QUERY, LAYER).ids == ["a", "b"]
    with pytest.raises(UserError, match=r"\(csv_row\): use order='file'"):
        storage.load(tmp_path, QUERY, LAYER, order="csv")


def test_a_retried_question_stands_where_it_was_planned(run):
    failed = run.questions(2)[0]
    assert write_generation(run.store, [[failed]], generation=1, first_part=4)
    again = Run.open(run.output_dir)
    with pytest.warns(UnfinishedWarning, match=r"not finished: 1 questions are not published yet"):
        assert storage.load(run.output_dir, QUERY, LAYER).missing == 1
    stage(again, 4)
    pack(again, 4)
    loaded = storage.load(run.output_dir, QUERY, LAYER)
    assert loaded.ids == [q.question_id for part in (1, 2, 3) for q in run.questions(part)]
    assert loaded.frame["part"].tolist() == [1] * 4 + [4] + [2] * 3 + [3] * 2
    check(loaded, bare(*parts(run)))


def test_parts_of_failures_alone_are_passed_over(tmp_path):
    run = make_run(tmp_path, 6)
    stage(run, 1, failed=[0, 1, 2])
    stage(run, 2)
    for part in (1, 2):
        pack(run, part)
    assert storage.load(tmp_path, QUERY, LAYER).ids == ["q4", "q5", "q6"]
    empty = storage.load(run.part_path(1), QUERY, LAYER)
    assert (empty.ids, empty.vectors.shape, len(empty.frame)) == ([], (0, 0), 0)
    assert list(storage.iter_samples(run.part_path(1))) == []


def test_the_garbage_collector_comes_back_whoever_ends_last():
    first, second = uncollected(), uncollected()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


# Part by part


def test_chunks_are_the_parts_one_after_another(run):
    whole = storage.load(run.output_dir, QUERY, LAYER, order="file")
    chunks = list(storage.iter_chunks(run.output_dir, QUERY, LAYER, columns=["question_id", "answer"]))
    assert [len(chunk.ids) for chunk in chunks] == [4, 3, 2]
    assert [i for chunk in chunks for i in chunk.ids] == whole.ids
    assert np.concatenate([chunk.vectors for chunk in chunks]).tobytes() == whole.vectors.tobytes()
    for chunk in chunks:
        assert chunk.frame["question_id"].tolist() == chunk.ids
        assert list(chunk.frame.columns) == ["question_id", "answer"]


def test_a_chunk_is_read_when_it_is_asked_for(run):
    chunks = storage.iter_chunks(run.output_dir, QUERY, LAYER)
    next(chunks)
    run.part_path(2).unlink()
    with pytest.raises(UserError, match=r"part_002\.h5: no such file"):
        next(chunks)


@pytest.mark.parametrize("stripped", [(), (ROWS, COLUMN)], ids=["ours", "without index"])
def test_samples_have_all_their_vectors(run, stripped):
    for path in parts(run):
        strip(path, *stripped, "none") if stripped else None
    samples = list(storage.iter_samples(run.output_dir))
    assert [s.question_id for s in samples] == list(bare(*parts(run)))
    by_id = {q.question_id: q for part in (1, 2, 3) for q in run.questions(part)}
    for sample in samples:
        expected = make_sample(by_id[sample.question_id])
        assert set(sample.vectors) == set(expected.vectors)
        for name, vector in sample.vectors.items():
            assert vector.tobytes() == expected.vectors[name].astype(np.float32).tobytes()
        assert sample.answer == expected.answer
        assert sample.attributes["csv_row"] == by_id[sample.question_id].csv_row
        assert sample.attributes["category"] == "colour"


# Unfinished runs


def test_an_unfinished_run_is_loaded_with_a_warning(tmp_path):
    run = make_run(tmp_path / "out", 8)
    with pytest.raises(UserError, match="no part of this run is published yet"):
        storage.load(run.output_dir, QUERY, LAYER)
    stage(run, 2)
    pack(run, 2)
    with pytest.warns(UnfinishedWarning, match=r"out is not finished: 5 questions are not published yet") as caught:
        loaded = storage.load(run.output_dir, QUERY, LAYER)
    assert caught[0].filename == __file__
    assert (loaded.ids, loaded.missing) == (["q4", "q5", "q6"], 5)
    with pytest.warns(UnfinishedWarning):
        assert [chunk.missing for chunk in storage.iter_chunks(run.output_dir, QUERY, LAYER)] == [5]
    for part in (1, 3):
        stage(run, part)
        pack(run, part)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert storage.load(run.output_dir, QUERY, LAYER).missing == 0


# Refusals


@pytest.mark.parametrize("stripped", [(), (COLUMN,)], ids=["ours", "without index"])
def test_a_field_that_is_not_there_is_refused_with_those_that_are(run, stripped):
    for path in parts(run):
        strip(path, *stripped) if stripped else None
    there = (
        f"it has {QUERY}/layer_0, {QUERY}/layer_1, {QUERY}/layer_3, vision_encoder_representation, {VISION},"
        " vision_token_representation/layer_0"
    )
    for field, layer in [(QUERY, 2), (QUERY, None), ("nonsense", None), (VISION, 3)]:
        with pytest.raises(UserError) as caught:
            storage.load(run.output_dir, field, layer)
        assert there in str(caught.value)
        assert str(parts(run)[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "facts", "name"),
    [
        ({"model": "Qwen/Qwen2.5-VL-3B-Instruct"}, {}, "model_name"),
        ({"dtype": "float32"}, {}, "dtype"),
        ({}, {"layers": (3,)}, "layers"),
        ({}, {"revision": "other"}, "revision"),
        ({}, {"positions": "min(patches,seq_len//2),last_prompt_token"}, "positions"),
        ({}, {"vision_only_definition": "encoder"}, "vision_only_definition"),
        ({}, {"prompt": "{question} Briefly."}, "prompt"),
    ],
)
def test_files_of_different_kinds_are_refused_with_both_names(tmp_path, settings, facts, name):
    paths = []
    for number, (changes, of_model) in enumerate([({}, {}), (settings, facts)], start=1):
        question = replace(make_questions(1)[0], question_id=f"q{number}")
        paths.append(tmp_path / f"x_embeddings_part_00{number}.h5")
        model = make_facts(**of_model)
        run_settings = make_settings(run_id=str(number), **changes)
        write_part(paths[-1], run_settings, model, number, [(question, make_sample(question, model=model))], [])
    with pytest.raises(UserError, match=rf"must not be mixed: for {name}, {paths[0]} has .*; {paths[1]} has"):
        storage.load(tmp_path, QUERY, LAYER)


def test_files_of_the_reference_script_are_not_mixed_with_ours(run, tmp_path):
    other = reference_file(tmp_path / "other.h5", ["z"])
    with pytest.raises(UserError, match=rf"{other} has no such attribute"):
        storage.load([*parts(run), other], QUERY, LAYER)


def test_files_with_the_same_question_are_refused(tmp_path):
    paths = [reference_file(tmp_path / f"{name}.h5", [name, "same"]) for name in "ab"]
    with pytest.raises(UserError, match=f"question same is in {paths[0]} and in {paths[1]}"):
        storage.load(paths, QUERY, LAYER)


def test_widths_that_differ_are_refused(tmp_path):
    for number, width in enumerate((4, 5)):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file[f"q{number}/{FIELD}"] = np.zeros(width, np.float32)
    with pytest.raises(UserError, match=f"{FIELD} has several widths in these files: 4, 5"):
        storage.load(tmp_path, QUERY, LAYER)
    with pytest.raises(UserError, match=f"{FIELD} has several widths in these files: 4, 5"):
        storage.torch_dataset(tmp_path, QUERY, LAYER, columns=())


def test_widths_that_differ_within_a_file_are_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for width in (4, 5):
            file[f"q{width}/{FIELD}"] = np.zeros(width, np.float32)
    with pytest.raises(UserError, match=rf"question q5: {FIELD} is not of width 4: \(5,\)"):
        storage.load(tmp_path, QUERY, LAYER)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no", "no such file"),
        ("", r"there is no \*\.h5 in it"),
        (None, "no file to read"),
        ("http://bucket/run", "is no location that we know: name a directory, or s3://BUCKET/PREFIX"),
    ],
)
def test_nothing_to_read_is_refused(tmp_path, name, message):
    source = [] if name is None else name if "://" in name else tmp_path / name
    with pytest.raises(UserError, match=message):
        storage.load(source, QUERY, LAYER)


# Damage


def damage(run: Run, kind: str) -> None:
    path = run.part_path(2)
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "vector":
        with h5py.File(path, "r") as file:
            offset = int(file.attrs[COLUMN + FIELD][1, 0])
        data = bytearray(path.read_bytes())
        data[offset + 5] ^= 1
        path.write_bytes(data)
    else:
        name = ROWS if kind.startswith("rows") else COLUMN + FIELD
        with h5py.File(path, "r+") as file:
            value = file.attrs[name]
            if kind == "rows":
                value[len(value) // 2] ^= 1
            elif kind == "rows of others":
                with h5py.File(run.part_path(1), "r") as other:
                    value = other.attrs[name]
            elif kind == "index":
                value[1, 0] += 1
            file.attrs[name] = value[:-1] if kind == "short index" else value
        describe_anew(path)


@pytest.mark.parametrize("kind", ["truncated", "vector", "index", "short index", "rows", "rows of others"])
def test_damage_is_refused_with_the_file_and_the_cure(run, kind):
    damage(run, kind)
    for read in (
        lambda: storage.load(run.output_dir, QUERY, LAYER),
        lambda: list(storage.iter_chunks(run.output_dir, QUERY, LAYER)),
        lambda: list(storage.iter_samples(run.output_dir)),
    ):
        with pytest.raises(DamagedError) as caught:
            read()
        assert str(caught.value).startswith(str(run.part_path(2)))
        assert REPAIR in str(caught.value)


def test_a_part_of_another_size_is_named_before_hdf5_sees_it(run, monkeypatch):
    path = run.part_path(2)
    size = path.stat().st_size
    monkeypatch.setattr("storage.reading.source.open_part", lambda path: open_part(path) if path != run.part_path(2) else 1 / 0)
    for other in (0, 8, size - 1, size + 1):
        os.truncate(path, other)
        with pytest.raises(DamagedError) as caught:
            storage.load(run.output_dir, QUERY, LAYER)
        assert str(caught.value).startswith(f"{path} has {other:,} bytes; it was published with {size:,}; `storage verify`")


def load_with_zeroed_pages(output_dir: Path, answers: Any) -> None:
    """Zero each page of a part in turn; put what loading gives."""
    [path] = output_dir.glob("*.h5")
    whole = path.read_bytes()
    for start in range(0, len(whole), 4096):
        page = bytes(len(whole[start : start + 4096]))
        path.write_bytes(whole[:start] + page + whole[start + 4096 :])
        try:
            loaded = storage.load(output_dir, QUERY, LAYER)
            answers.put((loaded.ids, loaded.vectors.tobytes(), loaded.frame["answer"].tolist()))
        except Exception as error:  # noqa: BLE001  (whatever it is, the test shows it)
            answers.put(f"{type(error).__name__}: {error}")
    answers.put(None)


def test_a_zeroed_page_anywhere_is_refused_or_not_needed_and_never_a_hang(tmp_path):
    run = make_run(tmp_path / "out", make_questions(60), model=make_facts(hidden_size=64), checkpoint_interval=60)
    stage(run, 1)
    pack(run, 1)
    whole = storage.load(run.output_dir, QUERY, LAYER)
    expected = whole.ids, whole.vectors.tobytes(), whole.frame["answer"].tolist()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=load_with_zeroed_pages, args=(run.output_dir, answers), daemon=True)
    process.start()
    found = list(iter(lambda: answers.get(timeout=60), None))  # queue.Empty: it hangs, or has crashed
    assert len(found) > 50
    refused = [answer for answer in found if answer != expected]
    assert 5 < len(refused) < len(found) - 5
    for answer in refused:
        assert answer.startswith(f"DamagedError: {run.part_path(1)}"), answer
        assert REPAIR in answer


# For torch


@pytest.fixture
def dataset_and_truth(run):
    return storage.torch_dataset(run.output_dir, QUERY, LAYER), bare(*parts(run))


def test_a_torch_dataset_gives_vectors_ids_and_columns(run, dataset_and_truth):
    from torch.utils.data import Dataset

    dataset, truth = dataset_and_truth
    assert isinstance(dataset, Dataset)
    assert len(dataset) == len(truth)
    for number, (question_id, vector) in enumerate(truth.items()):
        item = dataset[number]
        assert set(item) == {"vector", "question_id", "answer", "ground_truth_answer"}
        assert (item["question_id"], item["answer"]) == (question_id, f"answer to {question_id}")
        assert item["vector"].numpy().tobytes() == vector.tobytes()
    assert dataset[-1]["question_id"] == list(truth)[-1]
    with pytest.raises(IndexError):
        dataset[len(truth)]
    assert set(storage.torch_dataset(run.output_dir, QUERY, LAYER, columns=["seq_len"])[0]) == {
        "vector", "question_id", "seq_len",
    }  # fmt: skip
    with pytest.raises(UserError, match="there is no column nonsense"):
        storage.torch_dataset(run.output_dir, QUERY, LAYER, columns=["nonsense"])


@pytest.mark.parametrize(
    ("start", "stripped"), [("fork", False), ("spawn", False), ("fork", True)], ids=["fork", "spawn", "without index"]
)
def test_several_workers_of_a_data_loader_read_it(run, start, stripped):
    from torch.utils.data import DataLoader

    truth = bare(*parts(run))
    for path in parts(run):
        strip(path, COLUMN, ROWS) if stripped else None
    dataset = storage.torch_dataset(run.output_dir, QUERY, LAYER)
    assert next(iter(dataset))["question_id"] == next(iter(truth))  # read in this process first, then in its children
    loader = DataLoader(
        dataset, batch_size=4, shuffle=True, num_workers=2, multiprocessing_context=multiprocessing.get_context(start)
    )
    found = {
        question_id: vector.numpy()
        for batch in loader
        for question_id, vector in zip(batch["question_id"], batch["vector"], strict=True)
    }
    assert found.keys() == truth.keys()
    assert all(found[question_id].tobytes() == truth[question_id].tobytes() for question_id in truth)


def test_a_torch_dataset_is_pickled(dataset_and_truth):
    dataset, truth = dataset_and_truth
    again = pickle.loads(pickle.dumps(dataset))
    assert [item["question_id"] for item in again] == list(truth)


# Import


def test_import_storage_is_light():
    code = (
        "import sys, storage; heavy = {'torch', 'numpy', 'h5py', 'pandas', 'rich'}; print(sorted(heavy & set(sys.modules)));"
        "storage.load; print('torch' in sys.modules); print([n for n in storage.__all__ if not hasattr(storage, n)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nFalse\n[]\n"
    assert dir(storage) == sorted(storage.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = storage.nonsense


# Any table that enqueue takes comes back from load; any other is refused there

CELLS = st.text(st.characters(), max_size=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS, CELLS), min_size=1, max_size=6, unique_by=lambda row: row[0]),
    answers=st.lists(CELLS, min_size=6, max_size=6),
    distinct=st.integers(1, 3),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_any_table_round_trips_or_is_refused(tmp_path_factory, rows, answers, distinct, dtype):
    directory = tmp_path_factory.mktemp("any")
    with (directory / "vqa.csv").open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["question_id", "image_id", "question", "answer", "note"])
        writer.writerows(rows)
    try:
        questions = read_table(directory / "vqa.csv").questions
    except UserError as error:
        assert str(directory / "vqa.csv") in str(error)
        return
    pool = np.random.default_rng(0).standard_normal((distinct, 5)).astype(dtype)
    samples = [
        (question, Sample({FIELD: pool[number % distinct]}, answers[number], {})) for number, question in enumerate(questions)
    ]
    path = directory / "x_embeddings_part_001.h5"
    write_part(path, make_settings(), make_facts(), 1, samples, [])
    loaded = storage.load(path, QUERY, LAYER, order="csv")
    frame = loaded.frame
    assert loaded.ids == [q.question_id for q in questions]
    assert loaded.vectors.tobytes() == np.stack([s.vectors[FIELD] for _, s in samples]).astype(np.float32).tobytes()
    for name in ("image_id", "question", "ground_truth_answer"):
        assert frame[name].tolist() == [getattr(q, name) for q in questions]
    assert frame["note"].tolist() == [q.extra["note"] for q in questions]
    stored = [s.answer.replace("\0", "\ufffd").encode(errors="replace").decode() for _, s in samples]
    assert frame["answer"].tolist() == stored
    strip(path, ROWS, COLUMN)
    slowly = storage.load(path, QUERY, LAYER, order="csv")
    assert slowly.vectors.tobytes() == loaded.vectors.tobytes()
    assert slowly.frame[frame.columns].equals(frame)
