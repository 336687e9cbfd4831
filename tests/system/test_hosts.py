"""Several hosts: network namespaces with a link each, over one shared directory; a worker's host is cut off and comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chaos import VALKEY
from tests.support.clusters import VISIBILITY_TIMEOUT, assert_whole, finished, table_of
from tests.support.processes import BIN, command, start, wait_for

pytestmark = pytest.mark.slow

ADDRESSES = {"redis": "10.77.0.1", "one": "10.77.0.2", "two": "10.77.0.3", "collector": "10.77.0.4"}
PORT = 6379


class Hosts:
    """A switch and the hosts around it, each a network namespace of this machine."""

    def __init__(self, directory: Path, model: Path) -> None:
        self._ip = shutil.which("ip") or "ip"
        self._prefix = f"halp{os.getpid()}-"
        self._switch = f"{self._prefix}switch"
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self.model = model
        self.variables = {
            "HALP_BROKER_URL": f"redis://{ADDRESSES['redis']}:{PORT}/0",
            "HALP_VISIBILITY_TIMEOUT": str(VISIBILITY_TIMEOUT),
            "HALP_SWEEP_INTERVAL": "0.5",
            "HALP_DATA_ROOTS": str(directory),
            "HALP_MODEL": str(model),
            "HALP_MAX_BATCH_SIZE": "8",
            "HALP_ENGINE": "fake:0.4",
        }

    def build(self) -> None:
        """Make the network."""
        self._run("netns", "add", self._switch)
        self._run("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        self._run("-n", self._switch, "link", "set", "bridge", "up")
        for host, address in ADDRESSES.items():
            name = self._prefix + host
            self._run("netns", "add", name)
            self._run("link", "add", host, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", name)
            self._run("-n", self._switch, "link", "set", host, "master", "bridge", "up")
            self._run("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._run("-n", name, "link", "set", device, "up")

    def start(self, host: str, *line: object) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        log = self.log(host)
        process = start(*self._on(host), *line, log=log, cwd=self._directory, **self.variables)
        self._processes.append(process)
        return process

    def command(self, host: str, *line: object) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end."""
        return command(*self._on(host), *line, **self.variables)

    def link(self, host: str, state: str) -> None:
        """Pull out a host's cable, or put it back."""
        self._run("-n", self._switch, "link", "set", host, state)

    def log(self, host: str) -> Path:
        """Return where what runs on a host writes."""
        return self._directory / f"{host}.log"

    def end(self) -> None:
        """Kill everything and take the network away."""
        for process in self._processes:
            process.kill()
            process.wait(10)
        for name in (self._switch, *(self._prefix + host for host in ADDRESSES)):
            subprocess.run([self._ip, "netns", "delete", name], check=False, capture_output=True)

    def _on(self, host: str) -> tuple[object, ...]:
        return self._ip, "netns", "exec", self._prefix + host

    def _run(self, *arguments: str) -> None:
        subprocess.run([self._ip, *arguments], check=True)


@pytest.fixture
def hosts(tmp_path: Path, small_model: Path) -> Iterator[Hosts]:
    """Making a network needs root and iproute2: without them the test is left out, but not in CI."""
    if (os.geteuid() != 0 or shutil.which("ip") is None) and not os.environ.get("CI"):
        pytest.skip("making network namespaces needs root and iproute2")
    hosts = Hosts(tmp_path, small_model)
    try:
        hosts.build()
        yield hosts
    finally:
        hosts.end()


def staged(output: Path) -> int:
    return len(list((output / ".run" / "staging").glob("*/*.safetensors")))


def test_a_host_that_is_cut_off_and_comes_back_loses_and_repeats_nothing(hosts: Hosts, images: Path, tmp_path: Path) -> None:
    """What it had taken goes to the other worker meanwhile. Once back it ends the run alone: the other one is killed."""
    table, rows = table_of(tmp_path / "vqa.csv", 400)
    output = tmp_path / "output"
    address = ADDRESSES["redis"]
    hosts.start("redis", VALKEY, "--bind", address, "--port", PORT, "--protected-mode", "no", "--save", "", "--dir", tmp_path)
    wait_for(lambda: "Ready to accept connections" in hosts.log("redis").read_text(), 30, "the server is ready")
    options = ("--images-dir", images, "--output-dir", output, "--model", hosts.model, "--checkpoint-interval", 50)
    enqueued = hosts.command("collector", BIN / "producer", "enqueue", table, *options)
    assert enqueued.returncode == 0, enqueued.stderr
    hosts.start("collector", BIN / "workers", "collect")
    one = hosts.start("one", BIN / "workers", "extract", "--name", "one")
    two = hosts.start("two", BIN / "workers", "extract", "--name", "two")
    for host in ("one", "two"):
        wait_for(lambda host=host: "succeeded" in hosts.log(host).read_text(), 90, f"a first result of {host}")

    hosts.link("one", "down")
    time.sleep(2 * VISIBILITY_TIMEOUT)
    assert not finished(output)
    assert one.poll() is None
    hosts.link("one", "up")
    two.kill()
    two.wait()
    so_far = hosts.log("one").read_text().count("succeeded")
    wait_for(lambda: finished(output), 180, "the run is finished")
    assert hosts.log("one").read_text().count("succeeded") > so_far
    assert one.poll() is None
    assert_whole(output, rows, images)


def test_hosts_share_a_run_without_a_server_of_their_own(hosts: Hosts, images: Path, tmp_path: Path) -> None:
    """They have no way out, and a name that leads each to itself. The one that serves is ended, and the other goes on alone."""
    table, rows = table_of(tmp_path / "vqa.csv", 400)
    output = tmp_path / "output"
    options = ("--images-dir", images, "--output-dir", output, "--model", hosts.model, "--checkpoint-interval", 50, "--share")
    processes = {host: hosts.start(host, BIN / "producer", "run", table, *options) for host in ("one", "two")}
    workers = output / ".run" / "logs"
    wait_for(
        lambda: [log.read_text().count("succeeded") > 8 for log in workers.glob("worker-*.log")] == [True, True],
        120, "both compute",
    )  # fmt: skip
    [first] = [host for host in processes if "serves the run at" in hosts.log(host).read_text()]
    assert f"serves the run at {ADDRESSES[first]}:" in hosts.log(first).read_text()
    [other] = processes.keys() - {first}
    processes[first].terminate()
    assert processes[first].wait(60) == 130
    assert not finished(output)
    assert processes[other].wait(180) == 0
    assert f"serves the run at {ADDRESSES[other]}:" in hosts.log(other).read_text()
    assert_whole(output, rows, images)
