"""Each feeding has its own task ids, so that Flower shows what becomes of a question this time; old ids are still found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import redis
from celery.exceptions import Ignore

from storage.runs.run import Run
from tests.support.builders import make_run
from tests.workers.test_feed import Configure, client, configure
from tests.workers.test_tasks import Broken
from workers import tasks
from workers.queue import feed as feeding
from workers.queue.waiting import waiting

__all__ = ["client", "configure"]  # fixtures


def raws(run: Run, client: redis.Redis) -> dict[str, bytes]:
    """Return the queued messages by their lane."""
    return {lane: raw for lane in feeding.queues_of(run).lanes for raw in client.lrange(lane, 0, -1)}


def test_a_question_that_is_fed_again_is_another_task(tmp_path: Path, client: redis.Redis, configure: Configure) -> None:
    run = make_run(tmp_path, 1)
    ids = set()
    for _ in range(2):
        assert feeding.feed(run) == 1
        [(lane, raw)] = raws(run, client).items()
        ids.add(json.loads(raw)["headers"]["id"])
        assert waiting(client, run, feeding.queues_of(run), {1: {0}}, lambda: True) == {(1, 0)}
        client.delete(lane)
        feeding.reset(run)
    assert len(ids) == 2
    assert all(re.fullmatch(rf"{run.run_id}-001-0-[0-9a-f]{{6}}", found) for found in ids)
    older = re.sub(rb"(-001-0)-[0-9a-f]{6}", rb"\1", raw)
    assert older != raw
    client.lpush(lane, older)
    assert waiting(client, run, feeding.queues_of(run), {1: {0}}, lambda: True) == {(1, 0)}
    client.lset(lane, 0, raw.replace(b"-001-0-", b"-001-01-"))
    assert waiting(client, run, feeding.queues_of(run), {1: {0}}, lambda: True) == set()


def test_a_question_of_a_cancelled_run_does_not_count_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, 1)
    run.cancel()
    monkeypatch.setattr(tasks, "current_extractor", lambda: Broken(run, "extract", AssertionError("it was begun")))
    with pytest.raises(Ignore, match="cancelled"):
        tasks.extract(run_dir=run.location, run_id=run.run_id, part=1, sequence=0, question_id="q1", image_id="i")
