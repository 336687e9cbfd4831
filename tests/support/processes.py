"""Running our commands as a user does: in processes of their own, with a clean environment; and seeing what they leave."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def environment(**variables: str) -> dict[str, str]:
    """Return this environment without our variables, with those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HALP_")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **variables}


def command(*arguments: object, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end."""
    line = [str(BIN / str(arguments[0])), *map(str, arguments[1:])]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=environment(**variables), check=False)


def start(*arguments: object, log: Path, cwd: Path | None = None, **variables: str) -> subprocess.Popen[bytes]:
    """Start one of our commands in a session of its own."""
    line = [str(BIN / str(arguments[0])), *map(str, arguments[1:])]
    with log.open("ab") as file:
        return subprocess.Popen(
            line, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment(**variables), cwd=cwd,
            start_new_session=True,
        )  # fmt: skip


def wait_for(condition: Callable[[], object], timeout: float, what: str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout} s still not: {what}"
        time.sleep(0.05)


def with_word(word: str) -> list[psutil.Process]:
    """Return the living processes with a word (such as a test's own directory) in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if word in " ".join(process.cmdline()) or word in process.environ().get("HALP_DATA_ROOTS", ""):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def write_csv(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """Write a table of dictionaries."""
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
