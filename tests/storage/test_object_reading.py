"""Reading a run in an object store: the same as of a directory, by few requests, and never more than a part on this machine."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

import storage
from storage.errors import DamagedError, UnfinishedWarning, UserError
from storage.hdf5.columns import COLUMN
from storage.hdf5.rows import ROWS
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.stores import object_file
from storage.stores.object_store import ObjectStore
from tests.storage.test_load import reference_file
from tests.support.builders import make_facts, make_questions, make_run, make_sample, stage
from tests.support.processes import environment
from tests.support.s3_server import S3Server

QUERY, LAYER = "query_token_representation", 3
FIELD = f"{QUERY}/layer_{LAYER}"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of ten questions in three parts, planned in another order than the CSV's; one of them failed."""
    questions = make_questions(10, extra={"category": "colour"})
    run = make_run(tmp_path / "out", [questions[(7 * k + 3) % 10] for k in range(10)], checkpoint_interval=4)
    for part in (1, 2, 3):
        stage(run, part, failed=[0] if part == 2 else [])
        pack(run, part)
    return run


@pytest.fixture
def url(run: Run, s3_server: S3Server, s3_url: str) -> str:
    """The same run as objects."""
    upload(s3_server, run.output_dir, s3_url)
    return s3_url


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for temporary files."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def upload(server: S3Server, directory: Path, url: str) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            server.write(f"{url}/{path.relative_to(directory)}", path.read_bytes())


def check_same(here: storage.Loaded, there: storage.Loaded) -> None:
    assert there.ids == here.ids
    assert there.vectors.tobytes() == here.vectors.tobytes()
    pd.testing.assert_frame_equal(there.frame, here.frame)
    assert (there.field, there.missing) == (here.field, here.missing)


@pytest.mark.parametrize("block", [1 << 20, 500])
@pytest.mark.parametrize("order", ["plan", "csv", "file"])
def test_loading_gives_the_same_and_fetches_no_part(run, url, monkeypatch, order, block):
    monkeypatch.setattr(object_file, "BLOCK", block)
    monkeypatch.setattr(ObjectStore, "local_copy", lambda *_: pytest.fail("fetched whole"))
    here = storage.load(run.output_dir, QUERY, LAYER, order=order)
    check_same(here, storage.load(url, QUERY, LAYER, order=order))
    pd.testing.assert_frame_equal(storage.load_frame(url, order=order), here.frame)


def test_chunks_are_the_same(run, url, temporary):
    for here, there in zip(
        storage.iter_chunks(run.output_dir, QUERY, LAYER), storage.iter_chunks(url, QUERY, LAYER), strict=True
    ):
        check_same(here, there)
    assert list(temporary.iterdir()) == []


def test_samples_are_the_same_and_one_part_at_a_time_is_on_this_machine(run, url, temporary):
    number = 0
    for here, there in zip(storage.iter_samples(run.output_dir), storage.iter_samples(url), strict=True):
        assert [path.name.startswith("halp-copy-") for path in temporary.iterdir()] == [True]
        for field in dataclasses.fields(here):
            if field.name != "vectors":
                assert getattr(there, field.name) == getattr(here, field.name)
        assert there.vectors.keys() == here.vectors.keys()
        assert all(there.vectors[name].tobytes() == vector.tobytes() for name, vector in here.vectors.items())
        number += 1
    assert number == 9
    assert list(temporary.iterdir()) == []
    samples = storage.iter_samples(url)
    next(samples)
    samples.close()
    assert list(temporary.iterdir()) == []


def test_a_part_a_list_of_parts_and_a_prefix_without_a_run(run, url, s3_server):
    paths = sorted(run.output_dir.glob("*.h5"))
    urls = [f"{url}/{path.name}" for path in paths]
    check_same(storage.load(paths[1], QUERY, LAYER), storage.load(urls[1], QUERY, LAYER))
    check_same(storage.load(paths, QUERY, LAYER), storage.load(urls, QUERY, LAYER))
    check_same(storage.load(paths, QUERY, LAYER), storage.load([urls[0], *paths[1:]], QUERY, LAYER))
    for path in paths:
        s3_server.write(f"{url}-bare/{path.name}", path.read_bytes())
    check_same(storage.load(paths, QUERY, LAYER), storage.load(f"{url}-bare/", QUERY, LAYER))


@pytest.mark.parametrize("removed", [(COLUMN,), (ROWS,), (COLUMN, ROWS)])
def test_parts_without_index_or_rows(run, s3_server, s3_url, temporary, removed):
    for path in run.output_dir.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            for name in [name for name in file.attrs if name.startswith(removed)]:
                del file.attrs[name]
    shutil.rmtree(run.output_dir / ".run" / "parts")
    upload(s3_server, run.output_dir, s3_url)
    check_same(storage.load(run.output_dir, QUERY, LAYER), storage.load(s3_url, QUERY, LAYER))
    assert [s.question_id for s in storage.iter_samples(s3_url)] == storage.load(s3_url, QUERY, LAYER, order="file").ids
    assert list(temporary.iterdir()) == []


def test_files_of_the_reference_script_and_files_of_different_kinds(run, url, tmp_path, s3_server):
    path = reference_file(tmp_path / "m_embeddings_part_009.h5", ["b", "a"])
    s3_server.write(f"{url}-reference/{path.name}", path.read_bytes())
    check_same(storage.load(path, QUERY, LAYER), storage.load(f"{url}-reference", QUERY, LAYER))
    s3_server.write(f"{url}/{path.name}", path.read_bytes())
    with pytest.raises(UserError, match=f"{url}/{path.name} has no such attribute; {url}/{run.part_name(1)} has 'bfl"):
        storage.load(url, QUERY, LAYER)
    s3_server.write(f"{url}-twice/{path.name}", path.read_bytes())
    s3_server.write(f"{url}-twice/m_embeddings_part_010.h5", path.read_bytes())
    with pytest.raises(UserError, match="question a is in"):
        storage.load(f"{url}-twice", QUERY, LAYER)


def test_what_is_not_there(url, run, s3_server):
    with pytest.raises(UserError, match=f"{url}/nowhere: there is no \\*.h5 in it"):
        storage.load(f"{url}/nowhere", QUERY, LAYER)
    with pytest.raises(UserError, match=f"{url}/x.h5: no such file"):
        storage.load(f"{url}/x.h5", QUERY, LAYER)
    with pytest.raises(UserError, match=rf"{url}/{run.part_name(1)} has no {QUERY}/layer_2; it has {QUERY}/layer_0"):
        storage.load(url, QUERY, 2)
    s3_server.request("DELETE", f"/{url.removeprefix('s3://')}/{run.part_name(2)}")
    with pytest.warns(UnfinishedWarning, match=f"{url} is not finished: 4 questions are not published yet"):
        assert len(storage.load(url, QUERY, LAYER).ids) == 6


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("kind", ["truncated", "vector", "no HDF5"])
def test_damage_is_named_with_the_cure(run, url, s3_server, kind, described):
    address = f"{url}/{run.part_name(2)}"
    data = bytearray(run.part_path(2).read_bytes())
    if kind == "vector":
        with h5py.File(run.part_path(2)) as file:
            data[int(file.attrs[COLUMN + FIELD][1, 0]) + 5] ^= 1
    s3_server.write(address, bytes(data[: len(data) // 2] if kind == "truncated" else data if kind == "vector" else b"x"))
    if not described:
        s3_server.request("DELETE", f"/{url.removeprefix('s3://')}/{run.sidecar_key(2)}")
    for read in (
        lambda: storage.load(url, QUERY, LAYER),
        lambda: list(storage.iter_chunks(url, QUERY, LAYER)),
        lambda: list(storage.iter_samples(url)),
    ):
        with pytest.raises(DamagedError) as caught:
            read()
        assert str(caught.value).startswith(address)
        assert "`storage verify` finds what is damaged" in str(caught.value)


def test_a_network_that_goes_away_is_named(url, s3_server, monkeypatch):
    from storage.stores import object_client

    monkeypatch.setattr(object_client, "_RETRY_SECONDS", 1)
    object_client.connect.cache_clear()
    chunks = storage.iter_chunks(url, QUERY, LAYER)
    next(chunks)
    s3_server.control(away=True)
    with pytest.raises(UserError, match=f"{url}/.*: no answer: check the network"):
        next(chunks)
    s3_server.control(away=False)
    object_client.connect.cache_clear()


def run_script(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(**variables), timeout=120,
        check=False,
    )  # fmt: skip


def test_a_program_may_end_in_the_middle(url, s3_server):
    """HDF5 closes what is open after Python has ended, and would crash on a file that is read through Python."""
    code = f"import sys, storage; rest = storage.iter_chunks(sys.argv[1], {QUERY!r}, {LAYER}); chunk = next(rest)"
    done = run_script(code, url, **s3_server.variables)
    assert (done.returncode, done.stderr) == (0, "")


_LOADER = """
import sys
import storage
from torch.utils.data import DataLoader

if __name__ == "__main__":
    dataset = storage.torch_dataset(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    for batch in DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn"):
        for name, vector in zip(batch["question_id"], batch["vector"]):
            print(name, vector.numpy().tobytes().hex())
"""


def test_a_torch_dataset_in_spawned_workers(run, url, s3_server, tmp_path):
    here = storage.load(run.output_dir, QUERY, LAYER, order="file")
    script = tmp_path / "loader.py"
    script.write_text(_LOADER)
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = run_script(code, url, QUERY, str(LAYER), **s3_server.variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [x for i, v in zip(here.ids, here.vectors) for x in (i, v.tobytes().hex())]


def read_all(dataset: Any, answers: Any) -> None:
    try:
        answers.put(len(dataset.__getitems__([0, 1])))
    except UserError as error:
        answers.put(str(error))


def test_a_forked_process_is_told_what_to_do_and_does_not_hang(url):
    """As a DataLoader's worker is, unless it is told otherwise."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=read_all, args=(storage.torch_dataset(url, QUERY, LAYER), answers), daemon=True)
    process.start()
    answer = answers.get(timeout=60)
    process.join(60)
    assert answer.startswith(f"{url}/")
    assert "a process that was forked cannot use an object store that its parent has used" in answer
    assert "multiprocessing_context='spawn'" in answer


# The commands


@pytest.mark.parametrize("to", ["npz", "safetensors", "parquet", "csv"])
def test_export(run, url, storage_command, tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    field = () if to == "csv" else ("--field", QUERY, "--layer", LAYER)
    for source, name in ((run.output_dir, "here"), (url, "there")):
        assert storage_command("export", source, "--to", to, *field, "--output", name) == (0, f"{name}\n", "")
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_diff(run, url, storage_command, s3_server):
    code, out, err = storage_command("diff", run.output_dir, url)
    assert (code, err) == (0, "")
    assert out.endswith("the same\n")
    other = make_run(f"{url}-other", make_questions(10), checkpoint_interval=10)
    for sequence, question in enumerate(other.questions(1)):
        other.stage_sample(1, sequence, make_sample(question, answer="else" if sequence == 2 else None))
    pack(other, 1)
    code, out, _ = storage_command("diff", url, f"{url}-other", "--json")
    body = json.loads(out)
    assert (code, body["compared"], body["same"], len(body["only_in_second"])) == (1, 9, False, 1)
    assert [answer["second"] for answer in body["answers"]] == ["else"]
    assert all(field["equal"] == 9 for field in body["fields"])


def test_inspect_of_a_run_and_of_a_part_with_a_picture(run, url, storage_command, tmp_path):
    here, there = (json.loads(storage_command("inspect", place, "--json")[1]) for place in (run.output_dir, url))
    assert here.pop("source") == str(run.output_dir)
    assert there.pop("source") == url
    assert there == here
    for number, place in enumerate((url, f"{url}/{run.part_name(1)}")):
        picture = tmp_path / f"{number}.png"
        code, out, err = storage_command("inspect", place, "--plot", picture, "--colour-by", "finish_reason")
        assert (code, err) == (0, "")
        assert url in out
        assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = storage_command("inspect", url, "--question", "q1")
    assert code == 0
    assert "question q1" in out


def test_verify_and_report(run, url, storage_command, s3_server):
    assert storage_command("verify", url, "--deep")[0] == 0
    assert storage_command("report", url) == (0, f"{url}/report.html\n", "")
    assert b"answer to q1" in s3_server.read(f"{url}/report.html")


def test_probe_writes_its_results_beside_the_parts(s3_url, s3_server, storage_command, tmp_path):
    model = make_facts(num_hidden_layers=1, layers=(0,), hidden_size=4, vision_hidden_size=4)
    questions = make_questions(120, per_image=1)
    for place in (tmp_path / "run", s3_url):
        run = make_run(place, questions, model=model, checkpoint_interval=60)
        for piece in run.slices:
            for sequence, question in enumerate(run.questions(piece.part)):
                answer = question.ground_truth_answer if question.csv_row % 3 else "wrong"
                sample = make_sample(question, model=model, answer=answer)
                run.stage_sample(piece.part, sequence, sample)
            pack(run, piece.part)
    found: list[dict[str, Any]] = []
    for place in (tmp_path / "run", s3_url):
        code, out, _ = storage_command("probe", place, "--no-mlp")
        assert code == 0
        assert out.endswith(f"figure: {place}/probe.svg\n")
    found = [
        json.loads(data) for data in ((tmp_path / "run" / "probe.json").read_bytes(), s3_server.read(f"{s3_url}/probe.json"))
    ]
    assert found[1]["directory"] == s3_url
    assert found[1]["probes"] == found[0]["probes"]
    assert s3_server.read(f"{s3_url}/probe.svg").startswith(b"<?xml")
    np.testing.assert_equal(
        sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("probe")), ["probe.json", "probe.svg"]
    )
