"""Machines that share a run: one of them serves, another takes its place, and all find the one that does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import redis

from producer.local import sharing
from producer.local.machine import run_locally
from producer.local.server import EmbeddedServer
from producer.local.sharing import NOTES, SharedServer, answers, own_addresses, serving
from producer.local_state import is_worked_on
from producer.resuming import Resumption
from storage.errors import UserError
from storage.runs.run import Run
from tests.support.builders import make_run
from tests.support.clusters import Cluster, assert_whole, finished, table_of
from tests.support.processes import command, wait_for

HERE = ["127.0.0.1"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "output")


@pytest.fixture
def machines(run: Run) -> Iterator[list[SharedServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(SharedServer(run, HERE)) for _ in range(3)]


def named(machine: SharedServer) -> str:
    return Path(machine.variables["HALP_BROKER_URL_FILE"]).read_text()


def leaders(machines: list[SharedServer]) -> list[int]:
    return [number for number, machine in enumerate(machines) if machine.look()]


def test_one_of_those_that_begin_together_serves_all(machines: list[SharedServer], run: Run) -> None:
    with ThreadPoolExecutor(3) as threads:  # a server lives as long as the thread that began it
        assert sum(threads.map(SharedServer.look, machines)) == 1
        assert len(leaders(machines)) == 1
        assert len({named(machine) for machine in machines}) == 1
        assert serving(run) == named(machines[0])
    [note] = (run.output_dir / NOTES).iterdir()
    assert note.stat().st_mode & 0o777 == 0o600


def test_the_server_wants_its_password_and_shows_it_to_nobody(machines: list[SharedServer]) -> None:
    assert machines[0].look()
    url = named(machines[0])
    password = url.split(":")[2].partition("@")[0]
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(url.replace(f":{password}@", "")).ping()
    assert not answers(url.replace(password, "another"))
    server = machines[0]._own
    assert server is not None
    assert server._process is not None
    assert password not in " ".join(psutil.Process(server._process.pid).cmdline())
    assert server.directory.stat().st_mode & 0o077 == 0


def test_another_serves_at_once_where_one_ends_in_order(machines: list[SharedServer]) -> None:
    assert leaders(machines) == [0]
    machines[0].__exit__(None, None, None)
    assert leaders(machines[1:]) == [0]
    assert answers(named(machines[2]))


def test_another_serves_where_one_is_gone_and_a_late_one_gives_way(
    machines: list[SharedServer], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_GONE", 1.0)
    monkeypatch.setattr(sharing, "_PING", 0.5)
    assert leaders(machines) == [0]
    server = machines[0]._own
    assert server is not None
    assert server._process is not None
    process = server._process
    process.send_signal(signal.SIGSTOP)  # as a cluster suspends a job
    assert leaders(machines[1:]) == []
    wait_for(lambda: leaders(machines[1:]), 30, "another serves")
    process.send_signal(signal.SIGCONT)
    assert not machines[0].look()
    assert named(machines[0]) == named(machines[1])
    assert [path.name for path in (run.output_dir / NOTES).iterdir()] == ["000002"]


def test_a_server_that_died_is_replaced_by_its_own_machine(machines: list[SharedServer]) -> None:
    assert machines[0].look()
    before, server = named(machines[0]), machines[0]._own
    assert server is not None
    assert server._process is not None
    server._process.kill()
    server._process.wait()
    assert machines[0].look()
    assert named(machines[0]) != before
    assert answers(named(machines[0]))


def test_who_cannot_reach_a_server_that_is_there_says_so_and_does_not_replace_it(
    machines: list[SharedServer], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_GONE", 1.0)
    monkeypatch.setattr(sharing, "_UNREACHABLE", 2.0)
    note = run.output_dir / NOTES / "000007"
    note.parent.mkdir()
    note.write_text("redis://:secret@127.0.0.1:1/0")
    deadline = time.monotonic() + 30
    with pytest.raises(UserError, match=r"serves the run at 127\.0\.0\.1:1/0, and cannot be reached") as caught:
        while time.monotonic() < deadline:
            os.utime(note)
            assert not machines[0].look()
            time.sleep(0.1)
    assert "secret" not in str(caught.value)


def test_a_server_listens_where_it_is_asked_to_and_outlives_a_jobs_signal() -> None:
    with EmbeddedServer(HERE) as server:
        assert server._process is not None
        server._process.send_signal(signal.SIGTERM)
        server._process.send_signal(signal.SIGINT)
        [url] = server.urls
        for _ in range(20):
            assert answers(url)
            time.sleep(0.05)
        assert server.alive
    assert not answers(url)


def test_own_addresses_are_such_that_one_can_listen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedServer(own_addresses()) as server:
        assert all(map(answers, server.urls))
    monkeypatch.setattr(sharing, "_addresses", lambda: iter(["127.0.1.1", "::1", "fe80::1%1", "203.0.113.9"]))
    with EmbeddedServer(own_addresses()) as server:  # of its network cards
        assert all(map(answers, server.urls))
    monkeypatch.setattr(sharing, "_of_interfaces", lambda: iter(["127.0.0.1"]))
    assert own_addresses() == ["127.0.0.1"]


def test_a_run_that_is_shared_is_worked_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_worked_on(run)
    monkeypatch.setattr("producer.local.machine.check_private_files", lambda run: _look_from_within(run))
    with pytest.raises(_SeenError):
        run_locally(run, Resumption(None), model="", cache_dir=None, show=lambda account: None, share=True)
    assert not is_worked_on(run)


class _SeenError(Exception):
    pass


def _look_from_within(run: Run) -> None:
    assert is_worked_on(run)
    with pytest.raises(UserError, match="another `producer run` is at work"):
        run_locally(run, Resumption(None), model="", cache_dir=None, show=lambda account: None)
    raise _SeenError


def test_an_object_store_cannot_be_shared_so() -> None:
    result = command("producer", "run", "vqa.csv", "--images-dir", ".", "--output-dir", "s3://bucket/run", "--share")
    assert result.returncode == 2
    assert "--share wants a directory" in result.stderr


@pytest.mark.slow
def test_a_worker_follows_the_file_that_names_its_server(
    cluster: Cluster, tmp_path: Path, images: Path, small_model: Path
) -> None:
    """It may start before the file is there, and goes where the file leads later; HALP_BROKER_URL is not asked."""
    table, rows = table_of(tmp_path / "vqa.csv", 100)
    output, file = tmp_path / "output", tmp_path / "server"
    variables = {"HALP_BROKER_URL_FILE": str(file), "HALP_BROKER_URL": "redis://127.0.0.1:1/0"}
    worker = cluster.start("workers", "extract", HALP_ENGINE="fake:0.2", HALP_MAX_BATCH_SIZE="2", **variables)
    cluster.start("workers", "collect", **variables)
    log = tmp_path / "extract-0.log"
    wait_for(lambda: "HALP_BROKER_URL_FILE=" in log.read_text(), 60, "it waits")
    with EmbeddedServer(HERE) as first, EmbeddedServer(HERE) as second:
        file.write_text(first.urls[0])
        cluster.variables |= variables
        assert cluster.enqueue(table, images, output).returncode == 0
        wait_for(lambda: cluster.status(output)["staged"] > 0, 60, "the worker found it")
        file.write_text(second.urls[0])
        first._kill()
        wait_for(lambda: finished(output), 120, "worker and collector go on at the other one")
        assert worker.poll() is None
        assert_whole(output, rows, images)
