"""The batch file on a real Slurm of two nodes: tasks that are cancelled, preempted and out of time, and a run that is whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.runs.account import Bookkeeper
from storage.runs.run import Run
from tests.support.clusters import assert_whole, finished, some_staged, table_of
from tests.support.processes import BIN, command, wait_for
from tests.support.slurm import NODES, Slurm, cluster

FILE = Path(__file__).parents[2] / "deploy" / "slurm" / "halp.sbatch"
QUESTIONS = 1000


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with cluster() as found:
        yield found


def test_options_stand_where_slurm_reads_them() -> None:
    """Slurm's own comments are read up to the first command: an option below it would do nothing."""
    lines = FILE.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert options
    assert max(options) < first_command


@pytest.mark.parametrize(
    ("signals", "queued_again"),
    [
        ([signal.SIGUSR1], True),  # the time limit is near
        ([signal.SIGTERM], False),  # scancel; of a preemption Slurm queues it again itself
        ([signal.SIGUSR1, signal.SIGTERM], False),  # scancel while it ends: what a person has cancelled stays so
        ([signal.SIGTERM, signal.SIGUSR1], False),
        ([], False),
    ],
)
def test_only_a_task_that_runs_out_of_time_queues_itself_again(
    signals: list[signal.Signals], queued_again: bool, tmp_path: Path
) -> None:
    """The file by itself, with programs in the place of ours and of Slurm's."""
    (tmp_path / "producer").write_text(
        f"#!{sys.executable}\n"
        "import pathlib, signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        "pathlib.Path('begun').write_text(' '.join(sys.argv[1:]))\n"
        "while not pathlib.Path('finished').exists(): time.sleep(0.02)\n"
        "sys.exit(130 if got else 1)\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > queued\n')
    for program in ("producer", "scontrol"):
        (tmp_path / program).chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    task = subprocess.Popen(["bash", FILE, "vqa.csv", "--order", "csv"], cwd=tmp_path, env=variables, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text(), 30, "the program is begun")
        assert (tmp_path / "begun").read_text() == "run vqa.csv --order csv --share"
        for number in signals:
            task.send_signal(number)
            time.sleep(0.3)  # bash may take two that come together in either order
    finally:
        (tmp_path / "finished").touch()
    _, errors = task.communicate(timeout=30)
    assert (task.returncode, errors) == (130 if signals else 1, b"")
    assert (tmp_path / "queued").exists() == queued_again
    if queued_again:
        assert (tmp_path / "queued").read_text() == "requeue 17\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_survives_what_a_cluster_does(slurm: Slurm, tmp_path: Path, images: Path, small_model: Path) -> None:
    table, rows = table_of(tmp_path / "vqa.csv", QUESTIONS)
    output = tmp_path / "output"
    call = [
        FILE, table, "--images-dir", images, "--output-dir", output, "--model", small_model, "--checkpoint-interval", 50,
    ]  # fmt: skip

    def submit(*options: object, engine: str) -> str:
        return slurm.submit(
            *options, *call, cwd=tmp_path,
            HALP_ENGINE=engine, HALP_MAX_BATCH_SIZE="2", HALP_VISIBILITY_TIMEOUT="20",
            PATH=f"{BIN}:{slurm.variables['PATH']}", OMP_NUM_THREADS="1",
        )  # fmt: skip

    def log(task: str) -> str:
        path = tmp_path / f"halp-{task}.log"
        return path.read_text() if path.exists() else ""

    def done() -> int:
        account = Bookkeeper(Run.open(output)).account()
        return account.written + account.staged

    def workers() -> list[str]:
        status = json.loads(command("producer", "status", output, "--json").stdout)
        names: list[str] = status["workers"]
        return names

    def restarted(task: str) -> bool:
        return slurm.detail(task, "Restarts") not in ("", "0") and slurm.detail(task, "JobState") == "RUNNING"

    # Two tasks, and a third, submitted later, that joins them and has a minute. None of it can be finished in this phase.
    job = submit("--array=1-2", "--nodelist", NODES[0], engine="fake:3")
    wait_for(lambda: some_staged(output), 120, "the run begins")
    late = submit("--array=1", "--time=1", "--signal=B:USR1@10", "--nodelist", NODES[1], engine="fake:3")
    wait_for(lambda: slurm.states(f"{late}_1").get(f"{late}_1") == "RUNNING", 60, "the third task begins")
    leader, other = sorted((f"{job}_1", f"{job}_2"), key=lambda task: "serves the run at" not in log(task))
    assert "serves the run at" in log(leader)
    assert "serves the run at" not in log(other)
    wait_for(lambda: len(workers()) >= 2, 60, "both workers are seen from the login node")

    # The one that serves the others is cancelled: another takes its place.
    slurm.ask("scancel", leader)
    wait_for(lambda: leader not in slurm.states(job), 60, "a cancelled task ends")
    assert "Stopped. What is finished is kept" in log(leader)
    wait_for(lambda: "serves the run at" in log(other) + log(f"{late}_1"), 60, "another task serves the run")

    # More important work takes the other one's node; Slurm queues it again.
    before = done()
    urgent = slurm.submit("--partition=high", "--exclusive", "--nodelist", NODES[0], "--wrap", "sleep 1", cwd=tmp_path)
    wait_for(lambda: restarted(other), 120, "a preempted task begins again")
    assert "DUE TO PREEMPTION" in log(other)
    assert slurm.states(urgent) == {}
    wait_for(lambda: done() > before, 120, "the run goes on")

    # The third one's minute is over: it ends in order, and queues itself again.
    wait_for(lambda: restarted(f"{late}_1"), 180, "a task that was out of time begins again")
    assert "DUE TO TIME LIMIT" not in log(f"{late}_1")
    assert len(re.findall("Stopped. What is finished is kept", log(f"{late}_1"))) == 1

    # What the engine had begun was finished after the signals.
    def logs() -> list[str]:
        return [path.read_text() for path in (output / ".run" / "logs").glob("worker-*.log")]

    wait_for(lambda: len(logs()) >= 4, 120, "workers of three tasks, and of two more lives")
    assert sum(text.partition("Warm shutdown")[2].count("'written'") > 0 for text in logs()) >= 2

    # All is cancelled, and submitted again.
    slurm.ask("scancel", job, late)
    wait_for(lambda: slurm.states(job) == slurm.states(late) == {}, 60, "every task ends")
    wait_for(lambda: slurm.processes_of_jobs() == [], 60, "no process is left behind")
    before = done()
    assert 0 < before < QUESTIONS
    again = submit("--array=1-2", engine="fake:0")
    wait_for(lambda: finished(output), 180, "the run is finished")
    wait_for(lambda: slurm.states(again) == {}, 60, "its tasks end with it")
    assert {slurm.detail(f"{again}_{task}", "ExitCode") for task in (1, 2)} == {"0:0"}
    last = submit("--array=1", engine="fake:0")  # as one that was still waiting
    wait_for(lambda: slurm.states(last) == {}, 60, "a task has nothing to do")
    assert slurm.detail(f"{last}_1", "ExitCode") == "0:0"
    wait_for(lambda: slurm.processes_of_jobs() == [], 30, "no process is left behind")
    assert_whole(output, rows, images)
