"""What could not be looked at is not damaged: refused locks, a failing disk. And parts that are gone at the end of a run."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest

import producer.cli
from producer.commands.here import run_to_end
from producer.local import machine as local
from producer.resuming import Resumption
from storage import cli
from storage.errors import NotReadError
from storage.hdf5 import layout
from storage.hdf5.trouble import errno_of
from storage.runs.account import Bookkeeper
from storage.runs.pack import pack
from storage.runs.repair import repair
from storage.runs.run import Run
from storage.runs.verify import verify
from storage.stores import object_file
from tests.support.builders import make_questions, make_run, stage

NUMBERS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOLCK, errno.EAGAIN]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path / "out", make_questions(4), checkpoint_interval=2)
    for part in (1, 2):
        stage(run, part)
        pack(run, part)
    run.write_summary({})
    return run


def storage(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["storage", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def fail_at(place: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the disk fail where a part is opened, where HDF5 opens it, or while HDF5 reads it."""
    error = OSError(number, "the disk's own words")

    def fail(*_: object, **__: object) -> Any:
        raise error

    if place == "opening":
        monkeypatch.setattr(object_file, "_open_regular", fail)
    elif place == "HDF5 opening":
        monkeypatch.setattr(layout.h5py, "File", fail)
    else:
        error = OSError(f"Can't synchronously read data (file read failed: time = Mon, errno = {number}, error message = 'x')")
        monkeypatch.setattr("storage.hdf5.stored.StoredQuestion._text", fail)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", ["opening", "HDF5 opening", "HDF5 reading"])
def test_a_part_that_cannot_be_looked_at_is_neither_damaged_nor_repaired(run, monkeypatch, capsys, place, number):
    before = sorted(path.name for path in run.output_dir.iterdir())
    fail_at(place, number, monkeypatch)
    findings = list(verify(run))
    assert [(f.unread, f.part) for f in findings] == [(True, None)] * 2
    assert all("cannot be looked at now: " in f.problem or "cannot be read now: " in f.problem for f in findings)
    assert storage(["verify", str(run.output_dir)], monkeypatch) == 3
    shown = capsys.readouterr().err
    assert "--repair" not in shown
    assert run.part_name(1) in shown
    told: list[str] = []
    assert repair(run, unread=lambda finding: told.append(finding.file)) == {}
    assert told == [run.part_name(1), run.part_name(2)]
    assert sorted(path.name for path in run.output_dir.iterdir()) == before
    assert run.is_finished()


def test_damage_beside_what_could_not_be_looked_at_is_damage(run, monkeypatch):
    run.part_path(2).unlink()
    fail_at("opening", errno.EIO, monkeypatch)
    assert storage(["verify", str(run.output_dir), "--quiet"], monkeypatch) == 1
    assert list(repair(run)) == [run.part_name(2)]


def test_a_reader_says_that_it_is_the_disk(run, monkeypatch, capsys):
    fail_at("HDF5 reading", errno.EIO, monkeypatch)
    assert storage(["inspect", str(run.part_path(1))], monkeypatch) == 2
    assert capsys.readouterr().err == f"error: {run.part_path(1)} cannot be read now: Input/output error\n"


def test_the_number_of_an_error_is_found_in_the_words_of_hdf5():
    assert errno_of(RuntimeError("file read failed: errno = 116, error message = 'Stale file handle'")) == errno.ESTALE
    assert errno_of(OSError("file signature not found")) is None
    assert errno_of(NotReadError(5, "words")) == 5


def test_no_lock_is_asked_for(tmp_path, monkeypatch):
    """NFS without a lock manager refuses them: packing, describing, verifying and reading go on."""
    asked = []
    opened = h5py.File

    def note(*arguments: Any, **options: Any) -> h5py.File:
        asked.append(options.get("locking"))
        return opened(*arguments, **options)

    monkeypatch.setattr(h5py, "File", note)
    run = make_run(tmp_path / "out", make_questions(2), checkpoint_interval=2)
    stage(run, 1)
    assert pack(run, 1)
    assert list(verify(run, deep=True)) == []
    assert len(asked) >= 4
    assert set(asked) == {False}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_run_goes_on_without_the_lock_of_its_directory(run, monkeypatch, capsys, number):
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(local.fcntl, "flock", refuse)
    with local._alone(run, share=False):
        pass
    assert "a second `producer run` on it goes unnoticed" in capsys.readouterr().err


# The end of a run


@pytest.mark.parametrize("kind", ["gone", "cut", "empty"])
def test_a_part_that_is_gone_or_cut_is_no_success(run, tmp_path, monkeypatch, capsys, kind):
    path = run.part_path(1)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] if kind == "cut" else b"")
    if kind == "gone":
        path.unlink()
    expected = "was published and is gone" if kind == "gone" else f"it was published with {size:,}"
    books = Bookkeeper(run)
    books.account()
    [sentence] = books.lost_parts()
    assert sentence.startswith(path.name)
    assert sentence.endswith(expected)
    assert run_to_end(run, Resumption(None), tmp_path / "cache") == 4
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert "--repair" in shown.err
    assert run_to_end(run, Resumption(None), tmp_path / "cache", as_json=True) == 4
    assert json.loads(capsys.readouterr().out)["lost_parts"] == [sentence]
    monkeypatch.setattr(sys, "argv", ["producer", "status", str(run.output_dir)])
    with pytest.raises(SystemExit):
        producer.cli.main()
    assert sentence in capsys.readouterr().err


def test_a_sound_run_is_a_success(run, tmp_path, capsys):
    assert run_to_end(run, Resumption(None), tmp_path / "cache", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["lost_parts"] == []
