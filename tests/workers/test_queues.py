from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from celery import Celery

from workers.queue.app import _AMQP
from workers.queue.queues import COLLECT, LANES, ModelQueues, Rounds, declaration

QUEUES = ModelQueues("qwen25vl_7b", "bfloat16", "0123456789ab")
WORKERS = [f"extract-{i}@host-{i % 7}" for i in range(200)]


def test_names_tell_model_dtype_and_checkpoint():
    assert QUEUES.retry == "halp.qwen25vl_7b.bfloat16.0123456789ab.retry"
    assert QUEUES.lanes[0] == "halp.qwen25vl_7b.bfloat16.0123456789ab.000"
    assert QUEUES.lanes[-1] == "halp.qwen25vl_7b.bfloat16.0123456789ab.127"
    assert len({*QUEUES.lanes, QUEUES.retry, COLLECT}) == LANES + 2 == 130


@pytest.mark.parametrize("name", ["CELERY_BROKER_URL", "CELERY_BROKER_READ_URL"])
def test_the_broker_is_named_in_one_place(name):
    """`producer run` brings a server of its own, whatever another project's Celery uses in this shell."""
    code = "from workers.queue.app import app; print(app.conf.broker_url, app.conf.broker_read_url)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HALP_BROKER_URL": "redis://127.0.0.1:7/0", name: "redis://other:secret@host/0"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "redis://127.0.0.1:7/0 redis://127.0.0.1:7/0\n"
    assert done.stderr == f"{name} is not heeded: name the broker by HALP_BROKER_URL\n"


def test_a_worker_names_its_queues_by_their_prefix():
    """A log with 129 names is not read; the order in which they are served stays the worker's own."""
    queues = Celery("test", amqp=_AMQP).amqp.queues
    for name in (COLLECT, *QUEUES.in_order_of("extract-1@host")):
        queues.select_add(declaration(name))
    queues.select([f"{QUEUES.prefix}.*"])
    assert list(queues.consume_from) == list(QUEUES.in_order_of("extract-1@host"))
    assert queues.format(indent=0, indent_first=False) == f".> {QUEUES.prefix}.* (129 queues)"
    queues.select([COLLECT, QUEUES.retry])
    assert queues.format(indent=2) == f"  .> {COLLECT}\n  .> {QUEUES.prefix}.*"


@pytest.mark.parametrize("other", [("qwen25vl_3b",), ("qwen25vl_7b", "float32"), ("qwen25vl_7b", "bfloat16", "ba")])
def test_models_share_no_queue(other):
    others = ModelQueues(*other, *("qwen25vl_7b", "bfloat16", "0123456789ab")[len(other) :])
    assert not {*others.lanes, others.retry} & {*QUEUES.lanes, QUEUES.retry}


def test_questions_of_an_image_share_a_lane():
    assert {QUEUES.lane("run", "a.jpg") for _ in range(10)} == {QUEUES.lane("run", "a.jpg")}
    assert QUEUES.lane("run", "a.jpg") in QUEUES.lanes


def test_images_spread_over_the_lanes():
    """A lane with twice its share would leave one worker with it when the others have finished."""
    counts = Counter(QUEUES.lane("run", f"COCO_val2014_{i:012d}.jpg") for i in range(16_000))
    assert counts.keys() == set(QUEUES.lanes)
    assert 80 < min(counts.values()) <= max(counts.values()) < 175  # 125 on average


def test_an_image_has_other_lanes_in_other_runs():
    assert len({QUEUES.lane(f"run {i}", "a.jpg") for i in range(200)}) > LANES / 2


def test_run_and_image_are_not_run_together():
    assert {QUEUES.lane(f"run{i}", "1.jpg") == QUEUES.lane("run", f"{i}1.jpg") for i in range(100)} == {True, False}


def test_every_worker_serves_every_lane_after_the_retries():
    for worker in WORKERS:
        first, *lanes = QUEUES.in_order_of(worker)
        assert first == QUEUES.retry
        assert sorted(lanes) == sorted(QUEUES.lanes)


def test_workers_begin_at_different_lanes():
    counts = Counter(QUEUES.in_order_of(worker)[1] for worker in WORKERS)
    assert len(counts) > LANES / 2
    assert max(counts.values()) < 8


class Served:
    """Lists as Redis keeps them, and a worker that looks into them in rounds."""

    def __init__(self, **waiting: int) -> None:
        self.waiting = Counter({name.replace("_", "."): number for name, number in waiting.items()})
        self.rounds = Rounds()
        self.rounds.update(list(self.waiting))

    def take(self, number: int = 1) -> list[str]:
        taken = []
        for _ in range(number):
            taken.append(next(name for name in self.rounds.consume(len(self.waiting)) if self.waiting[name]))
            self.waiting[taken[-1]] -= 1
            self.rounds.rotate(taken[-1])
        return taken


def test_a_lane_is_emptied_before_the_next():
    assert Served(q_retry=0, q_000=2, q_001=1, q_002=2).take(5) == ["q.000", "q.000", "q.001", "q.002", "q.002"]


def test_retries_come_before_any_lane_and_rounds_go_on_after_them():
    served = Served(q_retry=1, q_000=1, q_001=2)
    assert served.take(3) == ["q.retry", "q.000", "q.001"]
    served.waiting.update({"q.retry": 1, "q.000": 1})
    assert served.take(3) == ["q.retry", "q.001", "q.000"]


def test_a_run_that_is_fed_all_the_while_keeps_no_lane_waiting():
    served = Served(q_retry=0, q_000=8, q_001=8, q_002=8)
    taken = []
    for _ in range(300):
        taken += served.take()
        served.waiting["q.000"] += 1
    assert taken.index("q.002") == 256 + 8


def test_one_image_with_very_many_questions_is_left_for_a_look_at_the_others():
    served = Served(q_retry=0, q_000=1000, q_001=1)
    assert served.take(257).index("q.001") == 256
    assert served.take(700) == ["q.000"] * 700


def test_rounds_go_on_after_the_queues_are_named_again():
    served = Served(q_retry=0, q_000=1, q_001=2)
    served.take(2)
    served.waiting["q.000"] += 1
    served.rounds.update(list(served.waiting))  # as after a lost connection
    assert served.take(2) == ["q.001", "q.000"]


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_other_processes_agree(seed):
    """The producer, the collector and every worker name lanes by themselves; Python's own hash would differ."""
    code = (
        "from workers.queue.queues import ModelQueues\n"
        "q = ModelQueues('qwen25vl_7b', 'bfloat16', '0123456789ab')\n"
        "print(*[q.lane('run', f'{i}.jpg') for i in range(50)], *q.in_order_of('extract-1@host'))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.split() == [
        *(QUEUES.lane("run", f"{i}.jpg") for i in range(50)),
        *QUEUES.in_order_of("extract-1@host"),
    ]


def test_lanes_do_not_change_between_versions():
    """Messages of an older version would wait in lanes where nobody looks for them."""
    assert [QUEUES.lanes.index(QUEUES.lane("run", f"{i}.jpg")) for i in range(8)] == [1, 74, 88, 80, 117, 29, 20, 4]
    assert QUEUES.lanes.index(QUEUES.in_order_of("extract-1@host")[1]) == 105
