"""Whose part a file is, is told without a hang, whatever is in the file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import pytest

from producer import planning
from storage.errors import UserError
from storage.hdf5 import identify as probe
from storage.hdf5.identify import identify_part
from storage.runs.pack import pack
from storage.runs.run import Run
from tests.support.builders import make_run, stage

PAGE = 4096


@pytest.fixture
def run(tmp_path) -> Run:
    run = make_run(tmp_path / "out", 6)
    for part in (1, 2):
        stage(run, part)
        pack(run, part)
    return run


def test_a_part_says_whose_it_is(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no package is
    path = run.part_path(1)
    assert identify_part(path, run.run_id, 1) == "ours"
    assert identify_part(path.relative_to(tmp_path), run.run_id, 1) == "ours"
    assert identify_part(path, run.run_id, 2) == "foreign"
    assert identify_part(path, "another", 1) == "foreign"


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [("missing", "foreign"), ("text", "foreign"), ("a directory", "foreign"), ("the reference script's", "foreign"),
     ("empty", "damaged"), ("truncated", "damaged"), ("cut to five bytes", "damaged"), ("zeroed", "damaged")],
)  # fmt: skip
def test_other_files_are_foreign_or_damaged(run, tmp_path, kind, verdict):
    path = tmp_path / "file.h5"
    if kind == "a directory":
        path.mkdir()
    elif kind == "the reference script's":
        with h5py.File(path, "w") as file:
            file.attrs["model_name"] = "a model"
    elif kind != "missing":
        part = run.part_path(1).read_bytes()
        contents = {"empty": b"", "text": b"precious", "cut to five bytes": part[:5], "zeroed": bytes(len(part))}
        path.write_bytes(contents.get(kind, part[:-1]))
    assert identify_part(path, run.run_id, 1) == verdict


def test_a_file_that_never_ends_is_given_up(run, tmp_path, monkeypatch):
    """As HDF5 does on some damaged heaps, opening a pipe without a writer waits for ever in one call."""
    monkeypatch.setattr(probe, "_TIMEOUT", 2.0)
    os.mkfifo(tmp_path / "pipe.h5")
    assert identify_part(tmp_path / "pipe.h5", run.run_id, 1) == "foreign"


def test_a_module_beside_the_parts_is_not_run(run, tmp_path, monkeypatch):
    """Workers and the collector are started where the runs are, and others may write there."""
    (tmp_path / "h5py.py").write_text("open('it ran', 'x')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert identify_part(run.part_path(1), run.run_id, 1) == "ours"
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("end", ["raise SystemExit(1)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_process_that_fails_says_nothing_of_the_file(run, tmp_path, monkeypatch, end):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nif 'storage.hdf5.identify' in sys.orig_argv: {end}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot look into .*part_001\.h5: the process that reads it ended"):
        identify_part(run.part_path(1), run.run_id, 1)
    monkeypatch.delenv("PYTHONPATH")
    assert identify_part(run.part_path(1), run.run_id, 1) == "ours"


def pages_of_heaps(path: Path) -> list[int]:
    """Return the pages on which a heap of strings begins: where the attributes are that say whose a file is."""
    data = path.read_bytes()
    return sorted({at // PAGE for at in range(len(data)) if data.startswith(b"GCOL", at)})


def zero_page(path: Path, page: int) -> None:
    data = bytearray(path.read_bytes())
    data[page * PAGE : (page + 1) * PAGE] = bytes(len(data[page * PAGE : (page + 1) * PAGE]))
    path.write_bytes(data)


def test_a_damaged_heap_hangs_neither_enqueue_nor_pack(run, monkeypatch):
    monkeypatch.setattr(probe, "_TIMEOUT", 10.0)
    path = run.part_path(1)
    whole = path.read_bytes()
    pages = pages_of_heaps(path)
    assert pages
    run.store.delete(run.sidecar_key(1))
    run = Run.open(run.output_dir)
    refused = 0
    for page in pages:
        path.write_bytes(whole)
        zero_page(path, page)
        if identify_part(path, run.run_id, 1) == "ours":
            continue  # a heap of the questions' texts alone: the root can be read
        with pytest.raises(UserError, match=r"part_001\.h5 is damaged, .* `producer enqueue … --repair` packs it again"):
            pack(run, 1)
        with pytest.raises(UserError, match=r"holds damaged parts of this run \(.*part_001.h5\): .* with --repair"):
            planning._refuse_other_content(run.output_dir, run.settings)
        refused += 1
    assert refused
    path.write_bytes(whole)
    planning._refuse_other_content(run.output_dir, run.settings)
    assert pack(run, 1)


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "gone"])
def test_a_damaged_part_with_a_sidecar_is_this_runs_and_is_not_opened(run, monkeypatch, kind):
    path = run.part_path(1)
    if kind == "truncated":
        os.truncate(path, 1000)
    elif kind == "zeroed":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        path.unlink()
    monkeypatch.setattr(planning, "identify_part", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr("storage.runs.pack.identify_part", lambda *_: pytest.fail("opened"))
    planning._refuse_other_content(run.output_dir, run.settings)
    assert pack(run, 1)


def test_another_runs_part_beside_ours_is_refused(run, tmp_path):
    other = make_run(tmp_path / "other", 3, run_id="another")
    stage(other, 1)
    pack(other, 1)
    run.store.delete(run.sidecar_key(1))
    shutil.copy(other.part_path(1), run.part_path(1))
    with pytest.raises(UserError, match=r"holds parts that are not this run's \(.*part_001"):
        planning._refuse_other_content(run.output_dir, run.settings)
