"""Two clusters that share nothing: a half-computed run that is copied goes on there, and the shards of each are merged."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import Cluster, assert_whole, some_staged, table_of
from tests.support.processes import command, start, wait_for, with_word


def run_here(place: Path, output: str, *more: object) -> Any:
    options = ("--images-dir", place / "images", "--output-dir", place / output, "--checkpoint-interval", 10)
    model = ("--model", place / "models" / "Qwen2.5-VL-Test")
    return command("producer", "run", place / "vqa.csv", *options, *model, *more, HALP_ENGINE="fake:0")


@pytest.fixture
def first(tmp_path: Path, images: Path, small_model: Path) -> Path:
    """A cluster's directory: table, images, model."""
    place = tmp_path / "first"
    shutil.copytree(images, place / "images")
    shutil.copytree(small_model, place / "models" / "Qwen2.5-VL-Test")
    table_of(place / "vqa.csv", 60)
    return place


def other_cluster(first: Path) -> Path:
    """Return another cluster's directory with copies of all that a run is made of, at paths of its own."""
    second = first.parent / "second"
    for name in ("images", "models"):
        shutil.copytree(first / name, second / name)
    shutil.copyfile(first / "vqa.csv", second / "vqa.csv")
    return second


@pytest.mark.slow
def test_a_half_computed_run_goes_on_where_it_is_copied_to(first: Path) -> None:
    options = ("--images-dir", first / "images", "--output-dir", first / "out", "--checkpoint-interval", 10)
    model = ("--model", first / "models" / "Qwen2.5-VL-Test")
    process = start("producer", "run", first / "vqa.csv", *options, *model, log=first / "run.log", HALP_ENGINE="fake:0.3",
                    HALP_MAX_BATCH_SIZE="4")  # fmt: skip
    try:
        wait_for(lambda: any((first / "out").glob("*.h5")) and some_staged(first / "out"), 90, "a part and more is there")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    wait_for(lambda: not with_word(str(first / "out")), 60, "its processes are gone")
    before = {p.relative_to(first): p.read_bytes() for p in (first / "out").rglob("*") if p.is_file()}
    second = other_cluster(first)
    shutil.copytree(first / "out", second / "out")
    shutil.rmtree(first / "images")  # what is on the first cluster is not there
    shutil.rmtree(first / "models")

    refused = run_here(second, "out")
    assert refused.returncode == 2
    assert "With --relocate the run goes on with them" in refused.stderr
    done = run_here(second, "out", "--relocate")
    assert done.returncode == 0, done.stderr
    assert_whole(second / "out", _rows(second), second / "images")
    parts = {path.name: path.read_bytes() for path in (second / "out").glob("*.h5")}
    published = {name.name: content for name, content in before.items() if name.suffix == ".h5"}
    assert published.items() <= parts.items()  # what was published there was not computed again
    assert {p.relative_to(first): p.read_bytes() for p in (first / "out").rglob("*") if p.is_file()} == before


def _rows(place: Path) -> list[dict[str, str]]:
    header, *lines = (place / "vqa.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


@pytest.mark.slow
def test_the_shards_of_two_clusters_are_one_run(first: Path, cluster: Cluster) -> None:
    """The one with its own server, the other with workers around a queue; tables, images and models lie elsewhere."""
    second = other_cluster(first)
    done = run_here(first, "shard", "--shard", "1/2")
    assert done.returncode == 0, done.stderr
    cluster.variables["HALP_MODEL"] = str(second / "models" / "Qwen2.5-VL-Test")
    cluster.variables["HALP_DATA_ROOTS"] = str(second)
    cluster.worker("fake:0")
    cluster.start("workers", "collect", second)
    cluster.model = second / "models" / "Qwen2.5-VL-Test"
    line = (second / "vqa.csv", second / "images", second / "shard", "--shard", "2/2", "--checkpoint-interval", 10)
    queued = cluster.enqueue(*line)
    assert queued.returncode == 0, queued.stderr
    wait_for(lambda: (second / "shard" / ".run" / "summary.json").exists(), 120, "the second shard is finished")

    merged = first.parent / "merged"
    result = command("storage", "merge", first / "shard", second / "shard", "--output-dir", merged, "--json")
    assert result.returncode == 0, result.stderr
    assert (json.loads(result.stdout)["written"], json.loads(result.stdout)["newly_merged"]) == (60, True)
    (merged / ".run" / "staging").mkdir(exist_ok=True)
    assert_whole(merged, _rows(first), first / "images")
    whole = run_here(first, "whole")
    assert whole.returncode == 0, whole.stderr
    same = command("storage", "diff", merged, first / "whole", "--json")
    assert (same.returncode, json.loads(same.stdout)["same"]) == (0, True), same.stdout
    refused = command("producer", "enqueue", second / "vqa.csv", "--images-dir", second / "images", "--output-dir", merged)
    assert refused.returncode == 2
    assert "is merged of other runs" in refused.stderr
