"""`storage export`: the values of the parts in every format, in order, whole; and never over a file that exists."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import storage
from storage import cli
from storage.reading.export import export as export_run
from storage.reading.stack import Stack
from storage.runs.pack import pack
from storage.runs.run import Run
from tests.support.builders import make_facts, make_questions, make_run, make_sample, stage

QUERY, VISION = "query_token_representation", "vision_only_representation"
ANSWERS = ['a "quoted", answer', "two\nlines", "日本", "", "=1+1", "plain", " padded "]


@pytest.fixture
def run(tmp_path) -> Run:
    """A run of seven questions in two parts, planned in another order than the CSV's, with awkward answers."""
    questions = make_questions(7)
    questions = [questions[(3 * k + 2) % 7] for k in range(7)]
    run = make_run(tmp_path / "out", questions, checkpoint_interval=4)
    for part in (1, 2):
        for sequence, question in enumerate(run.questions(part)):
            run.stage_sample(part, sequence, make_sample(question, answer=ANSWERS[question.csv_row - 1]))
        pack(run, part)
    return run


@pytest.fixture
def export(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Return `storage export` in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["storage", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return call


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_formulas_are_escaped_where_that_is_asked_for_alone(tmp_path, export, begin):
    run = make_run(tmp_path / "formulas", [replace(q, question_id=f"{begin}{q.question_id}") for q in make_questions(2)])
    for sequence, question in enumerate(run.questions(1)):
        run.stage_sample(1, sequence, make_sample(question, answer=f"{begin}1+1"))
    assert pack(run, 1)
    for options, mark in ((("--output", "plain.csv"), ""), (("--output", "escaped.csv", "--escape-formulas"), "'")):
        assert export(run.output_dir, "--to", "csv", *options)[0] == 0
        with (tmp_path / options[1]).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["question_id"] for row in rows] == [f"{mark}{begin}q1", f"{mark}{begin}q2"]
        assert [row["model_answer"] for row in rows] == [f"{mark}{begin}1+1"] * 2
        assert [row["image_id"] for row in rows] == ["image_0.jpg"] * 2


def test_csv_is_what_labelling_scripts_take(run, export, tmp_path):
    assert export(run.output_dir, "--to", "csv") == (0, "answers.csv\n", "")
    with (tmp_path / "answers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["question_id", "image_id", "question", "ground_truth_answer", "model_answer"]
    assert rows[1:] == [
        [q.question_id, q.image_id, q.question, q.ground_truth_answer, ANSWERS[n]] for n, q in enumerate(make_questions(7))
    ]


@pytest.mark.parametrize("at_once", [None, 2 * 8 * 4])  # bytes of vectors: two rows, so that a part is read in pieces
@pytest.mark.parametrize("to", ["npz", "safetensors", "parquet"])
def test_vectors_are_those_that_load_gives(run, export, tmp_path, monkeypatch, to, at_once):
    if at_once is not None:
        monkeypatch.setattr("storage.reading.export._AT_ONCE", at_once)
    expected = storage.load(run.output_dir, QUERY, 3)
    target = tmp_path / f"{QUERY}_layer_3.{to}"
    assert export(run.output_dir, "--to", to, "--field", QUERY, "--layer", 3) == (0, f"{target.name}\n", "")
    answers = expected.frame["answer"].tolist()
    if to == "npz":
        with np.load(target) as file:  # no pickle
            assert file["question_id"].tolist() == expected.ids
            assert file["answer"].tolist() == answers
            vectors = file["vectors"]
    elif to == "safetensors":
        with safe_open(target, "numpy") as file:
            vectors = file.get_tensor("vectors")
            assert file.metadata()["field"] == f"{QUERY}/layer_3"
            assert json.loads(file.metadata()["question_id"]) == expected.ids
            assert json.loads(file.metadata()["answer"]) == answers
        assert load_file(target)["vectors"].tobytes() == vectors.tobytes()
    else:
        frame = pd.read_parquet(target)
        vectors = np.stack(frame.pop("vector").to_list())
        assert frame["question_id"].tolist() == expected.ids
        assert frame["answer"].tolist() == answers
        assert frame["csv_row"].tolist() == expected.frame["csv_row"].tolist()
        assert [list(x) for x in frame["image_grid_thw"]] == expected.frame["image_grid_thw"].tolist()
    assert vectors.dtype == np.float32
    assert vectors.tobytes() == expected.vectors.tobytes()


@pytest.mark.parametrize("to", ["npz", "safetensors", "parquet"])
def test_several_layers(run, export, tmp_path, to):
    expected = storage.load(run.output_dir, QUERY, [3, 0])
    target = tmp_path / f"{QUERY}_layers_3_0.{to}"
    assert export(run.output_dir, "--to", to, "--field", QUERY, "--layer", "3, 0") == (0, f"{target.name}\n", "")
    if to == "npz":
        with np.load(target) as file:
            assert file["layers"].tolist() == [3, 0]
            vectors = file["vectors"]
    elif to == "safetensors":
        with safe_open(target, "numpy") as file:
            assert (file.metadata()["field"], file.metadata()["layers"]) == (QUERY, "[3, 0]")
            vectors = file.get_tensor("vectors")
    else:
        frame = pd.read_parquet(target)
        vectors = np.stack([np.stack(frame[f"vector_layer_{layer}"].to_list()) for layer in (3, 0)], axis=1)
    assert vectors.shape == (7, 2, 8)
    assert vectors.tobytes() == expected.vectors.tobytes()


def test_parquet_of_the_answers_alone(run, export, tmp_path):
    assert export(run.output_dir, "--to", "parquet", "--output", "x.parquet") == (0, "x.parquet\n", "")
    frame = pd.read_parquet(tmp_path / "x.parquet")
    assert "vector" not in frame
    assert frame["question_id"].tolist() == storage.load_frame(run.output_dir)["question_id"].tolist()


@pytest.mark.parametrize("to", ["npz", "safetensors"])
def test_a_text_that_some_files_lack_is_empty(run, export, tmp_path, to):
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in (1, 2):  # as the reference script's files are: without the attribute of all texts
        copy = Path(shutil.copy(run.part_path(number), copies))
        with h5py.File(copy, "r+") as part:
            del part.attrs["rows"]
            for question in list(part.values()) if number == 2 else []:
                del question["ground_truth_answer"]
    output = tmp_path / f"x.{to}"
    assert export(copies, "--to", to, "--field", "vision_only_representation", "--output", output)[0] == 0
    if to == "npz":
        answers = np.load(output)["ground_truth_answer"].tolist()
    else:
        with safe_open(output, "np") as file:
            answers = json.loads(file.metadata()["ground_truth_answer"])
    assert len(answers) == 7
    assert answers.count("") == 3


def test_a_single_part(run, export, tmp_path):
    assert export(run.part_path(2), "--to", "csv")[0] == 0
    assert len(pd.read_csv(tmp_path / "answers.csv")) == 3


def test_an_unfinished_run_is_exported_with_a_warning(tmp_path, export):
    run = make_run(tmp_path / "half", 6)
    stage(run, 2)
    pack(run, 2)
    code, out, err = export(run.output_dir, "--to", "csv")
    assert (code, out) == (0, "answers.csv\n")
    assert err == f"warning: {run.output_dir} is not finished: 3 questions are not published yet\n"


def test_a_file_that_exists_is_left_as_it_is(run, export, tmp_path, monkeypatch):
    (tmp_path / "answers.csv").write_text("labels by hand")
    code, _, err = export(run.output_dir, "--to", "csv")
    assert (code, err) == (2, "error: answers.csv exists: move it elsewhere, or give another --output\n")
    monkeypatch.setattr(Path, "exists", lambda _: False)  # it appears after the look
    code, _, err = export(run.output_dir, "--to", "csv")
    assert (code, err) == (2, "error: answers.csv has appeared in the meantime, and is left as it is\n")
    assert (tmp_path / "answers.csv").read_text() == "labels by hand"


@pytest.mark.parametrize("to", ["npz", "safetensors", "parquet"])
def test_an_error_while_writing_leaves_nothing(run, export, tmp_path, monkeypatch, to):
    before = sorted(tmp_path.iterdir())
    read, calls = Stack.read, []

    def fail_at_the_third(stack, rows):
        calls.append(rows)
        return read(stack, rows) if len(calls) < 3 else 1 / 0

    monkeypatch.setattr("storage.reading.export._AT_ONCE", 2 * 8 * 4)
    monkeypatch.setattr(Stack, "read", fail_at_the_third)
    with pytest.raises(ZeroDivisionError):
        export(run.output_dir, "--to", to, "--field", QUERY, "--layer", 3)
    assert sorted(tmp_path.iterdir()) == before


WIDTH = 2048


@pytest.fixture(scope="module")
def few_and_many(tmp_path_factory) -> tuple[Run, Run]:
    """Two runs of wide vectors, one with eight times the parts of the other."""
    model = make_facts(num_hidden_layers=1, layers=(0,), hidden_size=WIDTH, vision_hidden_size=2)
    runs = []
    for number in (80, 640):
        questions = make_questions(number, per_image=1)
        runs.append(make_run(tmp_path_factory.mktemp("runs"), questions, model=model, checkpoint_interval=40))
        for piece in runs[-1].slices:
            stage(runs[-1], piece.part)
            pack(runs[-1], piece.part)
    return runs[0], runs[1]


@pytest.mark.parametrize("to", ["npz", "safetensors", "parquet"])
def test_memory_does_not_grow_with_the_vectors(few_and_many, tmp_path, monkeypatch, to):
    monkeypatch.setattr("storage.reading.export._AT_ONCE", 40 * 4 * WIDTH)
    peaks = []
    for run in (few_and_many[0], *few_and_many):  # once beforehand: what is imported and cached at the first call
        tracemalloc.start()
        export_run(run.output_dir, to, VISION, None, tmp_path / f"{len(peaks)}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    further = (640 - 80) * 4 * WIDTH  # bytes of vectors: 4.6 MB, of which a copy in memory would be seen
    assert peaks[2] - peaks[1] < further / 2, peaks


def test_texts_that_no_safetensors_header_holds_are_refused(run, export, monkeypatch, tmp_path):
    monkeypatch.setattr("storage.reading.export._LONGEST_HEADER", 500)
    code, _, err = export(run.output_dir, "--to", "safetensors", "--field", QUERY, "--layer", 3)
    assert (code, "too many for the header of a safetensors file: choose --to npz or parquet" in err) == (2, True)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "xlsx"], "--to xlsx: the formats are npz, parquet, safetensors, csv"),
        (["--to", "npz"], "which vectors? `--to npz` needs --field"),
        (["--to", "csv", "--field", QUERY], "a CSV has no vectors"),
        (["--to", "parquet", "--escape-formulas"], "--escape-formulas is of --to csv alone"),
        (["--to", "npz", "--layer", "3"], "--layer needs --field"),
        (["--to", "npz", "--field", QUERY, "--layer", "2"], f"has no {QUERY}/layer_2; it has {QUERY}/layer_0"),
        (["--to", "npz", "--field", QUERY, "--layer", "0,last"], "--layer 0,last: a layer is a number from 0 on"),
        (["--to", "npz", "--field", QUERY, "--layer", "-1"], "--layer -1: a layer is a number from 0 on"),
        (["--to", "csv", "--output", "no/where.csv"], "no is no directory"),
    ],
)
def test_mistakes(run, export, tmp_path, arguments, message):
    before = sorted(tmp_path.iterdir())
    code, out, err = export(run.output_dir, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_without_pyarrow_the_extra_is_named(run, export, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = export(run.output_dir, "--to", "parquet")
    assert (code, err) == (2, "error: parquet needs pyarrow: pip install 'halp-extractor[parquet]'\n")


def test_files_of_the_reference_script_in_file_order(tmp_path, export):
    from tests.storage.test_load import reference_file

    reference_file(tmp_path / "m_embeddings_part_001.h5", ["b", "a"])
    assert export(tmp_path, "--to", "csv")[0] == 0
    assert pd.read_csv(tmp_path / "answers.csv")["question_id"].tolist() == ["a", "b"]


def test_odd_ids_are_exported_as_they_are(tmp_path, export):
    ids = ["a/b", "..", "%2F", "日本", "1"]
    run = make_run(tmp_path / "odd", [replace(q, question_id=i) for q, i in zip(make_questions(5), ids, strict=True)],
                   checkpoint_interval=5)  # fmt: skip
    stage(run, 1)
    pack(run, 1)
    assert export(run.output_dir, "--to", "csv")[0] == 0
    assert pd.read_csv(tmp_path / "answers.csv", dtype=str)["question_id"].tolist() == ids
