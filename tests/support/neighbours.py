"""What happens beside a run under fire: other runs in the same data root and strangers in the same Redis. Each has an outcome.

Every neighbour is a function of its surroundings that returns when its own run has ended as it must, and raises AssertionError
where it has not. `chaos.py` starts them while it kills processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import redis

from tests.support.expectations import Dataset, assert_whole, make_dataset
from tests.support.processes import command, start, wait_for

_HERE = Path(__file__).parent / "sabotage"
_QUESTIONS, _SLICE = 60, 20
_PATIENCE = 900.0  # seconds; processes are killed meanwhile, and the large run comes first
_HUGE = 10**18


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where a neighbour lives: the data root, the model and environment of its commands, the server."""

    directory: Path
    model: Path
    variables: dict[str, str]
    client: redis.Redis
    seed: int

    def dataset(self, name: str, number: int = _QUESTIONS) -> Dataset:
        """Make a dataset of its own."""
        place = self.directory / "neighbours" / name
        place.mkdir(parents=True)
        return make_dataset(place, number, random.Random(f"{self.seed} {name}"))

    def enqueue(self, data: Dataset, output: Path, *more: str) -> None:
        """Enqueue it, again and again while the server is away."""
        options = ("--images-dir", data.images, "--output-dir", output, "--model", self.model, "--allow-missing")
        line = ("producer", "enqueue", data.table, *options, "--checkpoint-interval", _SLICE, *more)

        def enqueued() -> bool:
            result = command(*line, **self.variables)
            assert result.returncode == 0 or "broker" in result.stderr, result.stderr
            return result.returncode == 0

        wait_for(enqueued, 120, f"{output} is enqueued")


def reused_directory(around: Surroundings) -> None:
    """A run's directory is deleted while workers work, and another table with the same ids is enqueued under its name."""
    first, second = around.dataset("first"), around.dataset("second")
    output = around.directory / "reused"
    around.enqueue(first, output)
    wait_for(lambda: any(output.glob(".run/staging/*/*")) or any(output.glob("*.h5")), _PATIENCE, "a question is staged")
    while output.exists():
        shutil.rmtree(output, ignore_errors=True)
    around.enqueue(second, output)
    _await_end(output)
    assert_whole(output, second)


def frozen_retry(around: Surroundings) -> None:
    """`retry` is frozen before it writes its plan, `--repair` computes its questions meanwhile, and it goes on then."""
    data = around.dataset("frozen")
    output = around.directory / "frozen"
    around.enqueue(data, output)
    _await_end(output)
    _mend_images(data)
    retry = start(
        "producer", "retry", output, log=around.directory / "retry.log", PYTHONPATH=str(_HERE),
        SABOTAGE_STOP_AT="plan.before:1", **around.variables,
    )  # fmt: skip
    try:
        wait_for(lambda: retry.poll() is not None or _is_stopped(retry.pid), 60, "the retry stands before its plan")
        for part in sorted(output.glob("*.h5")):
            part.unlink()
        around.enqueue(data, output, "--repair")
        wait_for(lambda: any(output.glob("*.h5")), _PATIENCE, "a part is computed again")
    finally:
        retry.send_signal(signal.SIGCONT)
    retry.wait(120)
    _await_end(output)
    written: Counter[str] = Counter()
    for part in sorted(output.glob("*.h5")):
        with h5py.File(part) as file:
            written.update(file.keys())
    assert written == Counter(row["question_id"] for row in data.rows)
    verified = command("storage", "verify", output, timeout=600)
    assert verified.returncode == 0, verified.stderr


def strangers_files(around: Surroundings) -> None:
    """Directories that look like runs: files that block, links that lead out, a settings file of nonsense."""
    precious = around.directory / "neighbours" / "precious"
    precious.mkdir(parents=True)
    for name in ("thesis.txt", "000001.safetensors", "old.partial"):
        (precious / name).write_text("precious")
    os.utime(precious / "old.partial", (1, 1))
    for name in ("fifo", "endless", "nonsense", "linked"):
        (around.directory / f"stranger-{name}" / ".run").mkdir(parents=True)
    os.mkfifo(around.directory / "stranger-fifo" / ".run" / "run.json")
    (around.directory / "stranger-endless" / ".run" / "run.json").symlink_to("/dev/zero")
    (around.directory / "stranger-nonsense" / ".run" / "run.json").write_text('{"model_slug": "../../x"}')
    data = around.dataset("linked")
    linked = around.directory / "stranger-linked"
    (linked / ".run").rmdir()
    around.enqueue(data, linked)
    shutil.rmtree(linked / ".run" / "tmp", ignore_errors=True)
    (linked / ".run" / "tmp").symlink_to(precious)
    sound = around.dataset("beside")
    output = around.directory / "beside"
    around.enqueue(sound, output)
    _await_end(output)
    assert_whole(output, sound)
    assert sorted(path.name for path in precious.iterdir()) == ["000001.safetensors", "old.partial", "thesis.txt"]


def poison(around: Surroundings) -> None:
    """Messages and values that are none of ours in every place of the server that a process looks at."""
    body = {
        "body": "W10=",
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {},
        "properties": {},
    }
    messages = [
        b"5", b"{", b"\xff\xfe", b"null", b"[" * 5000,
        json.dumps(body | {"content-encoding": 5}), json.dumps(body | {"properties": 5}),
        json.dumps(body | {"headers": {"task": "workers.extract", "id": "x", "stamped_headers": 5}}),
        json.dumps(body | {"headers": {"task": "workers.extract", "id": "x", "retries": _HUGE}}),
        json.dumps(body | {"headers": {"task": "workers.extract", "id": "x", "eta": "9999-12-31T23:59:59"}}),
    ]  # fmt: skip
    client = around.client

    def poisoned() -> bool:
        try:
            lanes = [key for key in client.scan_iter("halp.*", count=1000) if client.type(key) == b"list"]
            for key in {*lanes[:20], b"halp.collect"}:
                client.lpush(key, *messages)
            client.publish("/0.celery.pidbox", "5")
            client.hset("unacked", mapping={"stranger": "5", "other": "[1]"})
            client.zadd("unacked_index", {"stranger": 1, "other": 1})
            client.set("halp:worker:stranger", "5")
            client.set("halp:fed:stranger", "5")
        except redis.exceptions.ConnectionError:
            return False
        return True

    wait_for(poisoned, 120, "the server takes poison")
    data = around.dataset("poisoned")
    output = around.directory / "poisoned"
    around.enqueue(data, output)
    _await_end(output)
    assert_whole(output, data)


def full_disk(around: Surroundings) -> None:
    """A run on a disk that is full stops no other, and ends when there is room."""
    disk = around.directory / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        return  # root alone can make a small disk; the table says what happened
    try:
        data, sound = around.dataset("full", 200), around.dataset("sound")
        output, other = disk / "output", around.directory / "sound"
        around.enqueue(data, output)
        _fill(disk / "ballast")
        around.enqueue(sound, other)
        _await_end(other)
        assert_whole(other, sound)
        (disk / "ballast").unlink()
        _await_end(output)
        assert_whole(output, data)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


NEIGHBOURS: dict[str, Callable[[Surroundings], None]] = {
    "a directory reused": reused_directory,
    "a frozen retry": frozen_retry,
    "a stranger's files": strangers_files,
    "poison": poison,
    "a full disk": full_disk,
}


def _await_end(output: Path) -> None:
    wait_for(lambda: (output / ".run" / "summary.json").exists() and not _staged(output), _PATIENCE, f"{output} ends")


def _staged(output: Path) -> list[Path]:
    return [*(output / ".run" / "staging").glob("*"), *(output / ".run" / "tmp").glob("*")]


def _mend_images(data: Dataset) -> None:
    """Put sound images in place of the damaged ones."""
    [sound] = [name for name in sorted({row["image_id"] for row in data.rows}) if name.startswith("good")][:1]
    for row in data.rows:
        if row["question_id"] in data.reasons:
            shutil.copy(data.images / sound, data.images / row["image_id"])


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:  # until nothing more fits
        while True:
            try:
                file.write(b"0" * 4096)
            except OSError:
                return
