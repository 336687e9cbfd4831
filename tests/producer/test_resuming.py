"""A cancellation stands or falls by the order of the commands, whatever they are doing when it comes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import producer.cli
from producer import planning, resuming
from producer.resuming import Resumption
from storage.runs.cancellation import Cancellation
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.stores.store import DirectoryStore
from tests.support.builders import make_run, stage
from tests.support.processes import write_csv


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["producer", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        producer.cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", 3)


def test_the_cancellation_that_was_there_is_taken_back(run):
    run.cancel()
    time.sleep(0.01)
    assert Resumption(run.cancellation()).take_back(run)
    assert not run.is_cancelled()
    assert Resumption(None).take_back(run)


@pytest.mark.parametrize("before", [True, False])
def test_a_later_one_stands(run, before):
    if before:
        run.cancel()
    resumption = Resumption(run.cancellation())
    assert run.cancel() is not before
    assert not resumption.take_back(run)
    assert run.is_cancelled()
    assert Resumption(run.cancellation()).take_back(run)


def test_one_that_comes_while_the_earlier_is_taken_back_stands(run, monkeypatch):
    run.cancel()
    resumption, original = Resumption(run.cancellation()), DirectoryStore.get

    def get(store, key, *limit):
        note = original(store, key, *limit)
        if key.startswith(".run/cancelled.json."):
            Run.open(run.location).cancel()
        return note

    monkeypatch.setattr(DirectoryStore, "get", get)
    assert not resumption.take_back(run)
    assert run.is_cancelled()
    assert [path.name for path in run.output_dir.joinpath(".run").glob("cancelled*")] == ["cancelled.json"]


def test_one_that_comes_while_the_command_starts_is_later_than_it(run):
    run.cancel()
    assert Resumption.of(run.location).found is None  # this process began long before
    note = run.cancellation()
    assert note is not None and note.at is not None
    for at in (resuming._begun() - 1, time.time() + 3600):  # before; and by a clock that is an hour ahead
        run.withdraw_cancellation()
        run.store.put(".run/cancelled.json", json.dumps({"at": at}).encode())
        assert Resumption.of(run.location).found is not None


def test_one_of_an_earlier_version_is_taken_back(run):
    run.store.put(".run/cancelled.json", b"{}")
    resumption = Resumption.of(run.location)
    assert resumption.found == Cancellation(b"{}", None)
    assert resumption.take_back(run)


def test_where_there_is_no_run_nothing_is_found(tmp_path):
    assert Resumption.of(tmp_path / "none").found is None


@pytest.fixture
def dataset(tmp_path: Path) -> list[object]:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a.png")
    rows = [{"question_id": f"q{n}", "image_id": "a.png", "question": "What?", "answer": ""} for n in range(3)]
    table = write_csv(tmp_path / "vqa.csv", rows)
    return [table, "--images-dir", tmp_path / "images", "--output-dir", tmp_path / "out", "--model", "fake-model"]


@pytest.mark.parametrize("command", ["run", "enqueue"])
def test_a_command_that_is_cancelled_while_it_plans_begins_nothing(tmp_path, monkeypatch, dataset, command):
    monkeypatch.setenv("HALP_ENGINE", "fake")
    monkeypatch.setenv("HALP_BROKER_URL", "redis://127.0.0.1:1/0")
    original = planning.check_images

    assert call(monkeypatch, "enqueue", *dataset) == 2  # planned; there is no broker

    def cancelled_meanwhile(*arguments, **options):
        assert call(monkeypatch, "cancel", tmp_path / "out") == 0
        return original(*arguments, **options)

    monkeypatch.setattr(planning, "check_images", cancelled_meanwhile)
    assert call(monkeypatch, command, *dataset) == 130
    run = Run.open(tmp_path / "out")
    assert run.is_cancelled()
    assert run.staging_directories() == []


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have every file that would be written meet an error of its disk."""

    def meet(code: int) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("storage.stores.directory_store._write_synced", refuse)
        monkeypatch.setattr("storage.reading.export._write_csv", refuse)

    return meet


@pytest.mark.parametrize("code", [28, 30, 122, 13])  # full, read-only, over quota, not allowed
@pytest.mark.parametrize("arguments", [("cancel",), ("retry",), ("status",)])
def test_a_place_that_cannot_be_written_is_said_in_one_sentence(run, monkeypatch, capsys, unwritable, code, arguments):
    monkeypatch.setenv("HALP_BROKER_URL", "redis://127.0.0.1:1/0")
    unwritable(code)
    assert call(monkeypatch, *arguments, run.location) == (0 if arguments == ("status",) else 2)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if arguments == ("cancel",):
        assert err.startswith(f"error: cannot cancel: {run.location}: ") and err.count("\n") == 1
        assert not run.is_cancelled()
        run.store.path(".run/cancelled.json").write_bytes(b"{}")
        assert call(monkeypatch, *arguments, run.location) == 0  # as it was before


@pytest.mark.parametrize("command", ["report", "export"])
def test_storage_says_it_too(run, unwritable, storage_command, tmp_path, command):
    stage(run, 1)
    assert pack(run, 1)
    unwritable(28)
    more = ("--to", "csv", "--output", tmp_path / "x.csv") if command == "export" else ()
    exit_code, _, err = storage_command(command, run.location, *more)
    assert exit_code == 2 and err.startswith("error: cannot write") and "its disk is full" in err and err.count("\n") == 1
    assert not (tmp_path / "x.csv").exists()


def test_in_an_object_store_too(s3_url):
    run = make_run(s3_url, 3)
    run.cancel()
    first, second = Resumption(run.cancellation()), Resumption(run.cancellation())
    assert run.cancel() is False
    assert not first.take_back(run)
    assert Resumption(run.cancellation()).take_back(run)
    assert second.take_back(run)
