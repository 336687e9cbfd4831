"""Files that have a part's name and are none: every reader names them in a line, and none hangs or reads other files."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import resource
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest

import storage
from storage import cli
from storage.errors import DamagedError, LayoutError, UserError
from tests.support.hostile import FIELD, KINDS, SECRET, sound

MEMORY = 6 << 30  # of address space, of which the interpreter and its libraries take most
SECONDS = 60


def commands(path: Path) -> list[list[str]]:
    where, out = str(path.parent), str(path.parent / "out")
    return [
        ["inspect", str(path)],
        ["inspect", str(path), "--json"],
        ["inspect", where],
        ["export", where, "--to", "csv", "--output", f"{out}.csv"],
        ["export", where, "--to", "npz", "--field", FIELD, "--output", f"{out}.npz"],
        ["export", where, "--to", "parquet", "--output", f"{out}.parquet"],
        ["diff", where, where],
    ]


def read_all(directory: Path, answers: Any) -> None:
    """Make each file and give it to each reader; put what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number, (kind, make) in enumerate(KINDS.items()):
        path = directory / str(number) / "x.h5"
        path.parent.mkdir()
        make(path)
        for arguments in commands(path):
            answers.put((kind, arguments[0], *call(arguments)))
    answers.put(None)


def call(arguments: list[str]) -> tuple[Any, str]:
    """Call the command line; return its exit code, or the error that came out of it, and all that it printed."""
    sys.argv = ["storage", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code or 0, out.getvalue() + err.getvalue()
        except BaseException as error:  # noqa: BLE001  (whatever it is, the test shows it)
            return f"{type(error).__name__}: {error}", out.getvalue() + err.getvalue()
    return 0, out.getvalue() + err.getvalue()


def test_every_reader_names_what_is_no_part(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=read_all, args=(tmp_path, answers), daemon=True)
    process.start()
    found = list(iter(lambda: answers.get(timeout=SECONDS), None))  # queue.Empty: a reader hangs, or has crashed
    process.join()
    assert len(found) == len(KINDS) * len(commands(tmp_path))
    wrong = [answer for answer in found if answer[2] not in {0, 2} or "secret" in answer[3]]
    assert wrong == []
    refused = {kind for kind, _, code, shown in found if code == 2 and ("x.h5" in shown)}
    assert set(KINDS) - refused == set()
    for kind, command, code, shown in found:
        assert code == 0 or shown.startswith("error: "), (kind, command, shown)
    assert not any(SECRET[:7] in path.read_bytes() for path in tmp_path.glob("*/out*"))


@pytest.mark.parametrize("kind", ["external storage", "a virtual dataset", "an external link for a vector"])
def test_other_files_are_not_read_as_vectors(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "x.h5")
    for read in (lambda: storage.load(tmp_path / "x.h5", FIELD), lambda: list(storage.iter_samples(tmp_path / "x.h5"))):
        with pytest.raises(LayoutError, match=rf"x\.h5 is not a part of this layout: h0/{FIELD}.* another place"):
            read()


def test_a_file_that_the_process_has_open_is_read(tmp_path: Path) -> None:
    """HDF5 refuses a second opening with other flags for locks: a notebook has a part open, and loads it."""
    sound(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r") as file:
        vectors = storage.load(tmp_path / "x.h5", FIELD).vectors
        assert vectors[0].tobytes() == file["h0"][FIELD][:].tobytes()


def test_an_error_travels_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(LayoutError("x.h5", "q1/answer", "is no text")))
    assert str(error) == "x.h5 is not a part of this layout: q1/answer is no text"
    assert isinstance(error, UserError)
    assert not isinstance(error, DamagedError)
    assert json.dumps(error.problem)
