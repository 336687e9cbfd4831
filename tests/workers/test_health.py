"""Presence and health: what a process says of itself, and what `workers health` and `producer status` make of it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from storage.errors import UserError
from tests.support.clusters import Cluster, table_of
from tests.support.processes import command, wait_for
from workers.monitor.health import check_of_broker, checks_of_processes
from workers.monitor.presence import Announcer, Presence, decode, of_this_process, present_here
from workers.settings import WorkerSettings

CONFIG = WorkerSettings(engine_timeout=10, load_timeout=100, sweep_interval=5)


def worker(**changes: object) -> Presence:
    now = time.time()
    whole = Presence("w@host", 1, 1, now - 50, seen=now, serves="halp.x", model="m", device="cpu")
    return replace(whole, **changes)  # type: ignore[arg-type]


def failing(*here: Presence, broker: str | None = None) -> list[str]:
    checks = [check_of_broker(broker), *checks_of_processes(here, CONFIG)]
    return [check.name for check in checks if not check.healthy]


def test_health_names_what_fails() -> None:
    now = time.time()
    assert failing(worker()) == []
    assert failing(worker(), broker="redis://x does not answer") == ["broker"]
    assert failing() == ["process"]
    assert failing(worker(seen=now - 100)) == ["w@host process"]
    assert failing(worker(busy_since=now - 60)) == []  # the watchdog has its turn first
    assert failing(worker(busy_since=now - 80)) == ["w@host engine"]
    assert failing(worker(device="", started=now - 150)) == []
    assert failing(worker(device="", started=now - 170)) == ["w@host engine"]
    assert failing(worker(loading_since=now - 170)) == ["w@host engine"]
    assert failing(worker(image_since=now - 100)) == []  # a slow image is ended by its own limit
    assert failing(worker(image_since=now - 400)) == ["w@host images"]
    collector = worker(serves="", collects=True, swept=now - 800)
    assert failing(collector) == []
    assert failing(replace(collector, swept=now - 1000)) == ["w@host collector"]


def test_notes_of_dead_processes_count_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text(json.dumps({"name": "w", "pid": 2**22 + 5, "ticks": 7, "started": 0.0}))
    (tmp_path / "2.json").write_text(json.dumps({"name": "w", "pid": os.getpid(), "ticks": 7, "started": 0.0}))
    (tmp_path / "3.json").write_text("{")
    assert present_here(tmp_path) == []
    present_here(tmp_path, clean=True)
    assert list(tmp_path.iterdir()) == []


def test_notes_of_another_shape_are_none() -> None:
    assert decode(b'{"name": "w"}') is None
    assert decode(b"[]") is None
    assert decode(None) is None


def test_the_directory_of_notes_is_private(tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(UserError, match="this user alone"):
        Announcer(lambda: of_this_process("w"), place, lambda: None)
    link = tmp_path / "link"
    place.chmod(0o700)
    link.symlink_to(place)
    with pytest.raises(UserError, match="this user alone"):
        Announcer(lambda: of_this_process("w"), link, lambda: None)


def test_health_of_real_processes(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """A worker and a collector are seen with what they serve and have done; a stopped one is not healthy for long."""
    cluster.variables["HALP_RUNTIME_DIR"] = str(tmp_path / "runtime")

    def health(*options: str) -> tuple[int, dict[str, bool]]:
        result = command("workers", "health", "--json", *options, **cluster.variables)
        body = json.loads(result.stdout)
        assert (result.returncode == 0) == body["healthy"]
        return result.returncode, {check["name"]: check["healthy"] for check in body["checks"]}

    assert health() == (1, {"broker": True, "process": False})
    table, _ = table_of(tmp_path / "vqa.csv", 30)
    output = tmp_path / "output"
    cluster.enqueue(table, images, output, "--checkpoint-interval", 30)
    extract = cluster.start("workers", "extract", "--name", "w", HALP_ENGINE="fake:0.1")
    cluster.start("workers", "collect", "--name", "c")
    wait_for(lambda: any(output.glob("*.h5")), 60, "the part")
    wait_for(lambda: len(health()[1]) == 5, 30, "both are there")
    code, found = health()
    assert code == 0, found
    assert [name.partition("@")[0] for name in found] == ["broker", "c", "c", "w", "w"]
    assert len(health("--name", "w")[1]) == 3
    assert command("workers", "health", "--quiet", **cluster.variables).stdout == ""
    no_broker = cluster.variables | {"HALP_BROKER_URL": "redis://127.0.0.1:1/0"}
    assert command("workers", "health", **no_broker).returncode == 1
    alone = command("workers", "health", "--without-broker", **no_broker)
    assert (alone.returncode, len(alone.stdout.splitlines())) == (0, 4), alone.stdout

    cluster.processes[1].kill()  # the collector: so that the next run stays unfinished
    unfinished = tmp_path / "unfinished"
    cluster.enqueue(table_of(tmp_path / "more.csv", 3)[0], images, unfinished, "--checkpoint-interval", 1)

    def seen() -> bool:
        workers = cluster.status(unfinished)["presence"]
        return [(w["model"], w["device"], w["done"]) for w in workers] == [(str(cluster.model), "cpu", 33)]

    wait_for(seen, 60, "status shows the worker, its model and all that it has done")
    note = tmp_path / "runtime" / f"{extract.pid}.json"
    assert decode(note.read_text()) is not None
    extract.terminate()
    assert extract.wait(30) == 0
    assert not note.exists()
    assert health() == (1, {"broker": True, "process": False})


def test_a_model_that_does_not_load_in_time_ends_the_worker(cluster: Cluster, tmp_path: Path) -> None:
    worker = cluster.start("workers", "extract", HALP_ENGINE="fake", HALP_LOAD_TIMEOUT="0.01")
    assert worker.wait(60) == 1
    assert "was not loaded after 0.01 s (HALP_LOAD_TIMEOUT)" in (tmp_path / "extract-0.log").read_text()
