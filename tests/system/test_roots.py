"""Workers that serve a run's model and may not touch the run: said at once, with what mends it; and a run without a broker."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import redis

from producer.show.roots import kept_out
from storage.runs.run import Run
from tests.support.builders import make_run
from tests.support.clusters import Cluster, table_of
from tests.support.processes import command, wait_for
from workers.monitor.presence import KEY, Presence, decode, telling
from workers.queue.feed import queues_of


def worker(run: Run, name: str, *roots: str, **changes: object) -> Presence:
    whole = Presence(name, 1, 1, 0.0, seen=time.time(), serves=queues_of(run).prefix, device="cpu", data_roots=roots)
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_who_may_not_touch_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", 3)
    place = run.location
    inside = worker(run, "in@host", str(tmp_path))
    silent = worker(run, "old@host", data_roots=None)
    other = worker(run, "other@host", "/elsewhere", serves="halp.another")
    beside = worker(run, "beside@host", f"{place}-2")
    assert list(kept_out(run, [inside, silent, other])) == []
    out = [worker(run, f"w{n}@host", "/x", "s3://b/y") for n in range(7)]
    told = list(kept_out(run, [inside, *out, beside]))
    assert told == [
        "w0@host, w1@host, w2@host, w3@host, w4@host and 2 more may not touch this run, though of its model: "
        f"{place} lies outside the data roots (/x, s3://b/y); add it: --data-root '{place}', or in HALP_DATA_ROOTS",
        f"beside@host may not touch this run, though of its model: {place} lies outside the data roots ({place}-2); "
        f"add it: --data-root '{place}', or in HALP_DATA_ROOTS",
    ]


def test_who_may_not_pack_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    collector = worker(run, "collect@host", "/x", serves="", collects=True)
    [told] = kept_out(run, [collector])
    assert told == (
        f"collect@host may not pack this run: {run.location} lies outside the data roots (/x); "
        f"add it: `workers collect … {run.location}`, or in HALP_DATA_ROOTS"
    )
    here = worker(run, "here@host", str(tmp_path), serves="", collects=True)
    assert list(kept_out(run, [collector, here])) == []  # one is enough
    both = worker(run, "celery@host", "/x", collects=True)
    assert len(list(kept_out(run, [both]))) == 1


def test_notes_of_other_versions_are_read_by_both() -> None:
    """A note without data roots says nothing of them, and a reader passes over what it does not know."""
    body = asdict(Presence("w@host", 1, 1, 0.0, data_roots=("/data",)))
    told = decode(json.dumps(body))
    assert told is not None
    assert (told.may_touch("/data/run"), told.may_touch("/database")) == (True, False)
    del body["data_roots"]
    before = decode(json.dumps({**body, "of a later version": [1]}))
    assert before is not None
    assert before.may_touch("/anywhere")


@pytest.mark.parametrize("roots", [("/a",) * 51, ("/" + "a" * 5000,), ("/\udcff",)], ids=["many", "long", "no text"])
def test_roots_that_a_note_cannot_hold_are_not_told(roots: tuple[str, ...]) -> None:
    assert telling(("/a", "s3://b/c")) == ("/a", "s3://b/c")
    told = decode(json.dumps(asdict(Presence("w@host", 1, 1, 0.0, data_roots=telling(roots)))))
    assert told is not None
    assert told.may_touch("/anywhere")


@pytest.mark.slow
def test_enqueue_and_status_say_so_at_once(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    table, _ = table_of(tmp_path / "vqa.csv", 5)
    allowed, output = tmp_path / "allowed", tmp_path / "elsewhere"
    allowed.mkdir()
    cluster.start("workers", "extract", "--name", "w", "--data-root", allowed, HALP_ENGINE="fake")
    cluster.start("workers", "collect", allowed, "--name", "c")
    with redis.Redis.from_url(cluster.variables["HALP_BROKER_URL"]) as client:
        wait_for(lambda: len(list(client.scan_iter(KEY + "*"))) == 2, 60, "both have said that they are there")
    enqueued = cluster.enqueue(table, images, output)
    assert enqueued.returncode == 0, enqueued.stderr
    told = " ".join(enqueued.stderr.split())
    assert f"may not touch this run, though of its model: {output} lies outside the data roots ({allowed})" in told
    assert f"add it: --data-root {output}, or in HALP_DATA_ROOTS" in told
    assert f"may not pack this run: {output} lies outside" in told
    problems = [p for p in cluster.status(output)["problems"] if " may " in p]  # beside what a worker has refused by then
    assert [p.split(" may ")[1].split(":")[0] for p in problems] == [
        "not touch this run, though of its model",
        "not pack this run",
    ]
    again = json.loads(cluster.enqueue(table, images, output, "--json").stdout)
    assert again["problems"] == problems
    assert cluster.enqueue(table, images, output, "--quiet").stderr == ""


@pytest.mark.slow
def test_the_status_of_a_run_without_a_broker(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """A run of `producer run` needs none, whether or not one answers; one that was queued is told of."""
    table, _ = table_of(tmp_path / "vqa.csv", 3)
    run = make_run(tmp_path / "alone", 3)
    (run.output_dir / ".run" / "lock").touch()  # as `producer run` leaves it
    for url in ("redis://127.0.0.1:1/0", cluster.variables["HALP_BROKER_URL"]):
        status = command("producer", "status", run.location, HALP_BROKER_URL=url)
        assert status.returncode == 0
        assert status.stderr.startswith("The account is from the files. The queue was not asked: `producer run` brings")
        assert len(status.stderr.splitlines()) == 1
        body = json.loads(command("producer", "status", run.location, "--json", HALP_BROKER_URL=url).stdout)
        assert (body["problem"], body["problems"], body["note"]) == (None, [], status.stderr.strip())
    queued = tmp_path / "queued"
    cluster.enqueue(table, images, queued)
    away = command("producer", "status", queued, HALP_BROKER_URL="redis://127.0.0.1:1/0").stderr
    assert "The queue was not asked: the broker redis://" in away
    assert "does not answer" in away
    (queued / ".run" / "lock").touch()  # begun by `producer run`, and queued later
    assert "No worker at" in cluster.status(queued)["problem"]
    assert cluster.status(queued)["note"] is None
