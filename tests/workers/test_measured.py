"""The time of batches that are asked for two at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.sample import ENGINE_SECONDS, Sample
from workers.monitor.metrics import measured


@pytest.mark.parametrize("fails", [False, True])
def test_the_second_ones_time_begins_with_the_firsts_end(fails: bool) -> None:
    first_ends = threading.Event()

    def run(requests: list[str]) -> list[Sample]:
        if requests == ["first"]:
            time.sleep(0.3)
            first_ends.set()
            if fails:
                raise RuntimeError
        else:
            first_ends.wait(10)
            time.sleep(0.1)
        return [Sample({}, "", {})]

    timed = measured(run)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(timed, ["first"])
        second = pool.submit(timed, ["second"])
    assert first.exception() is None or fails
    [sample] = second.result()
    assert 0.05 < sample.facts[ENGINE_SECONDS] < 0.25
