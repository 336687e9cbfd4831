"""What a person sees while a run goes on: bars, rate, time left, workers; on a real terminal and where there is none."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from producer.show.display import workers_table
from producer.show.live import LiveAccount, Pace
from storage.runs.account import Account
from storage.runs.pack import pack
from storage.screen.terminal import duration
from tests.support.builders import make_run, stage
from tests.support.clusters import Cluster, table_of
from tests.support.processes import BIN, command, environment
from workers.monitor.presence import Presence

GPU = {"gpu_memory_used": 20_000_000_000, "gpu_memory_total": 80_000_000_000, "gpu_busy": 0.97}


def worker(**changes: object) -> Presence:
    fields = {
        "name": "extract-1@host",
        "pid": 1,
        "ticks": 1,
        "started": 0.0,
        "seen": time.time(),
        "model": "m",
        "dtype": "bfloat16",
    }
    fields |= {"device": "cpu", "computed": 120, "batches": 10, "prefixes": 20, "retrying": {"0123456789abcdef": 3}}
    return Presence(**{**fields, **changes})  # type: ignore[arg-type]


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6)
    console = Console(file=io.StringIO(), force_terminal=True, width=240, height=40, color_system=None)
    with LiveAccount(console, run, lambda: [worker()]) as live:
        live.show(Account(planned=100, written=40, failed=2, staged=8, outstanding=50, parts_planned=10, parts_published=4))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for state, number in {"written": 40, "staged": 8, "retrying": 3, "failed": 2}.items():
        assert re.search(rf"{state} +[━╸╺]+ +{number} of 100", shown), shown
    assert f"{run.location}: 4/10 parts, 2 failed, 3 tried again, waiting for the first question, " in " ".join(shown.split())
    assert re.search(r"[0-9.]+ GB of disk free", shown)
    assert re.search(r"extract-1@host .*│ 12\.0 +│ 6\.0", shown)


def test_a_line_where_there_is_no_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6)
    console = Console(file=io.StringIO(), width=20)
    with LiveAccount(console, run, lambda: []) as live:
        for _ in range(3):
            live.show(Account(planned=100, staged=8, outstanding=92, parts_planned=10))
    [line] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.startswith("8/100 questions, 0/10 parts, waiting for the first question, ")


def test_quiet_asks_nobody(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6)
    console = Console(file=io.StringIO(), quiet=True)
    with LiveAccount(console, run, lambda: pytest.fail("the broker was asked")) as live:
        live.show(Account(planned=1))


def test_gpus_are_shown_where_there_are_some() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(workers_table([worker(), worker(name="gpu", **GPU)]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "20.0 of 80.0 GB" in shown
    assert "97%" in shown
    console = Console(file=io.StringIO(), width=200)
    console.print(workers_table([worker(computed=0, batches=0, prefixes=0)]))
    assert "GPU" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_worker_that_shares_no_images_says_so() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(workers_table([worker(), worker(name="other", whole=True)]))
    assert console.file.getvalue().count("whole prompts") == 1  # type: ignore[attr-defined]


def test_the_pace_is_of_the_last_minute() -> None:
    def account(number: int) -> Account:
        return Account(planned=10_000, staged=number)

    pace = Pace()
    for second in range(30):
        pace.note(account(5), second)
    assert (pace.begun, pace.rate(29)) == (False, 0)  # the model is loaded meanwhile
    for second in range(30, 130):
        pace.note(account(5 + 2 * (second - 29)), second)
    assert pace.rate(129) == pytest.approx(2)
    for second in range(130, 160):
        pace.note(account(205), second)
    assert pace.rate(159) == pytest.approx(1, rel=0.05)
    assert pace.moved == 129


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 250, 7500)] == ["0 s", "1 min 00 s", "4 min 10 s", "2 h 05 min"]


@pytest.mark.parametrize(("how", "code"), [("written", 0), ("failed", 1), ("gone", 4), ("cancelled", 130)])
def test_watching_ends_as_the_run_did(tmp_path: Path, how: str, code: int) -> None:
    run = make_run(tmp_path / "out", 3)
    if how == "cancelled":
        run.cancel()
    else:
        stage(run, 1, failed=[1] if how == "failed" else [])
        assert pack(run, 1)
    if how == "gone":
        run.part_path(1).unlink()
    for options in ((), ("--json",)):
        assert command("producer", "status", run.location, "--watch", *options).returncode == code
        assert command("producer", "status", run.location, *options).returncode == 0


@pytest.mark.slow
def test_watching_a_real_run(cluster: Cluster, images: Path) -> None:
    """Of 80 questions one image is missing and one cannot be opened for now: bars, retries, the worker, the end."""
    (images / "3.png").unlink()
    (images / "4.png").unlink()
    (images / "4.png").symlink_to("4.png")
    table, _ = table_of(cluster.directory / "vqa.csv", 80)
    output = cluster.directory / "output"
    result = cluster.enqueue(table, images, output, "--checkpoint-interval", 20)
    assert result.returncode == 0, result.stderr
    leader, follower = pty.openpty()
    line = [str(BIN / "producer"), "status", str(output), "--watch"]
    variables = environment(TERM="xterm-256color", LINES="40", **cluster.variables)
    with subprocess.Popen(line, stdin=follower, stdout=follower, stderr=follower, env=variables) as watching:
        os.close(follower)
        cluster.collector()
        cluster.start("workers", "extract", HALP_ENGINE="fake:0.3", HALP_MAX_RETRIES="30")
        shown = ""
        with suppress(OSError):  # the terminal's end
            while data := os.read(leader, 65536):
                shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
                if (images / "4.png").is_symlink() and re.search(r"retrying +[━╸╺]+ +2 of 80", shown):
                    (images / "4.png").unlink()  # seen: now it can be opened
                    shutil.copy(images / "5.png", images / "4.png")
    os.close(leader)
    assert watching.returncode == 1, shown[-3000:]  # one has failed
    assert re.search(r"(written|staged) +[━╸╺]+ +[1-9][0-9]* of 80", shown)
    assert not (images / "4.png").is_symlink()
    assert re.search(r"[0-9.]+/s, (\d+ min )?\d+ s left", shown)
    assert re.search(r"extract-\d+@.*│ (ready|busy) +│", shown)
    assert "failed: image_missing" in shown  # the account at the end
    final = command("producer", "status", output, "--json", **cluster.variables)
    assert '"failed": 2' in final.stdout
