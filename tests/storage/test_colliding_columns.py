"""A table's columns that are called as ours survive beside them, wherever a run is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import pandas as pd
import pytest

import storage
from producer.dataset.selection import order_by_image
from producer.dataset.table import read_table
from storage.hdf5.rows import ROWS
from storage.runs.pack import pack
from tests.support.builders import make_run, stage
from tests.support.processes import write_csv

FIELD = "vision_only_representation"
THEIRS = {
    "gt_answer": "g", "ground_truth_answer": "their truth", "image_name": "their image", "part": "7",
    "part_csv": "already", "vector": "their vector", "device": "their device", "model_answer": "their model's",
}  # fmt: skip
# What each is called in a frame.
NAMES = {
    "gt_answer": "gt_answer", "ground_truth_answer": "ground_truth_answer_csv", "image_name": "image_name",
    "part": "part_csv_csv", "part_csv": "part_csv", "vector": "vector_csv", "device": "device", "model_answer": "model_answer",
}  # fmt: skip


@pytest.fixture(params=["index", "groups"])
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A finished run over a table with such columns, read from the packed rows or from the groups."""
    row = {"question_id": "q1", "image_id": "ours.jpg", "question": "What?", "answer": "our truth"} | THEIRS
    questions = read_table(write_csv(tmp_path / "vqa.csv", [row, row | {"question_id": "q2"}])).questions
    run = make_run(tmp_path / "o", order_by_image(questions))
    stage(run, 1)
    assert pack(run, 1)
    if request.param == "groups":
        with h5py.File(run.part_path(1), "r+") as part:
            del part.attrs[ROWS]
        (tmp_path / "o" / run.sidecar_key(1)).unlink()
    return tmp_path / "o"


def check(frame: pd.DataFrame) -> None:
    assert frame["answer"].tolist() == ["answer to q1", "answer to q2"]
    assert frame["ground_truth_answer"].tolist() == ["our truth"] * 2
    assert frame["image_id"].tolist() == ["ours.jpg"] * 2
    assert frame["part"].tolist() == [1, 1]
    for theirs, name in NAMES.items():
        assert frame[name].tolist() == [THEIRS[theirs]] * 2
    assert frame.columns.is_unique


def test_in_a_frame(directory: Path) -> None:
    check(storage.load(directory, FIELD).frame)
    check(storage.load_frame(directory))
    [chunk] = storage.iter_chunks(directory, FIELD)
    check(chunk.frame)


def test_in_a_sample(directory: Path) -> None:
    sample = next(storage.iter_samples(directory))
    assert sample.ground_truth_answer == "our truth"
    assert {name: sample.attributes[name] for name in NAMES.values()} == {n: THEIRS[t] for t, n in NAMES.items()}


def test_in_a_torch_dataset(directory: Path) -> None:
    item = storage.torch_dataset(directory, FIELD, columns=["vector_csv", "part"])[0]
    assert (item["vector_csv"], item["part"], len(item["vector"])) == ("their vector", 1, 8)


def test_in_a_parquet_file(directory: Path, tmp_path: Path, storage_command: Callable[..., tuple[int, str, str]]) -> None:
    path = tmp_path / "all.parquet"
    code, _, err = storage_command("export", directory, "--to", "parquet", "--field", FIELD, "--output", path)
    assert code == 0, err
    frame = pd.read_parquet(path)
    check(frame)
    assert len(frame["vector"][0]) == 8


def test_in_a_csv_of_answers(directory: Path, tmp_path: Path, storage_command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = storage_command("export", directory, "--to", "csv", "--output", tmp_path / "a.csv")
    assert code == 0, err
    assert pd.read_csv(tmp_path / "a.csv").iloc[0].to_dict() == {
        "question_id": "q1", "image_id": "ours.jpg", "question": "What?", "ground_truth_answer": "our truth",
        "model_answer": "answer to q1",
    }  # fmt: skip


def test_in_an_inspection(directory: Path, storage_command: Callable[..., tuple[int, str, str]]) -> None:
    [path] = directory.glob("*.h5")
    code, out, err = storage_command("inspect", path, "--json")
    assert code == 0, err
    selected = json.loads(out)["selected"]
    assert selected["texts"]["ground_truth_answer"] == "our truth"
    assert {name: selected["attributes"][name] for name in THEIRS} == THEIRS
