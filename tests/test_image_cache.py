"""The cache of decoded images: loaded once, few at a time, bounded in bytes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from workers.image_cache import ImageCache


@dataclass(frozen=True)
class Picture:
    name: str
    nbytes: int


class Loads:
    """Makes pictures of a size, and sees how many are made at once."""

    def __init__(self, nbytes: int, seconds: float = 0.0) -> None:
        self.names: list[str] = []
        self.most = self._now = 0
        self._nbytes, self._seconds = nbytes, seconds
        self._lock = threading.Lock()

    def of(self, name: str) -> Picture:
        with self._lock:
            self.names.append(name)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self._seconds)
        with self._lock:
            self._now -= 1
        return Picture(name, self._nbytes)


def test_no_more_are_loaded_at_a_time_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    cache: ImageCache[Picture] = ImageCache(10**9, 0)
    loads = Loads(1, 0.02)

    def use(number: int) -> None:
        with cache.hold(number, lambda: loads.of(str(number))):
            pass

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(use, range(30)))
    assert len(loads.names) == 30
    assert loads.most == 3


def test_nothing_is_loaded_while_those_in_use_exceed_the_bound() -> None:
    cache: ImageCache[Picture] = ImageCache(100, 100)
    loads = Loads(60)
    third = threading.Event()

    def use() -> None:
        with cache.hold("c", lambda: loads.of("c")):
            third.set()

    thread = threading.Thread(target=use)
    with cache.hold("a", lambda: loads.of("a")) as first:
        with cache.hold(
            "b", lambda: loads.of("b")
        ):  # 120 of 100 bytes: one picture may exceed it, or none would ever fit
            thread.start()
            with cache.hold("a", lambda: loads.of("a")) as again:
                assert again is first
            assert not third.wait(0.2)
        assert third.wait(10)  # 60 of 100
    thread.join()
    assert loads.names == ["a", "b", "c"]


def test_one_that_is_larger_than_the_bound_is_loaded_and_not_kept() -> None:
    cache: ImageCache[Picture] = ImageCache(100, 100)
    loads = Loads(1000)
    for _ in range(2):
        with cache.hold("a", lambda: loads.of("a")) as picture:
            assert picture.nbytes == 1000
    assert loads.names == ["a", "a"]


def test_one_that_cannot_be_loaded_costs_no_place() -> None:
    cache: ImageCache[Picture] = ImageCache(100, 100)

    def fail() -> Picture:
        raise MemoryError("no room")

    for _ in range(20):
        with pytest.raises(MemoryError, match="no room"), cache.hold("a", fail):
            pass
    with cache.hold("a", lambda: Picture("a", 1)) as picture:
        assert picture.name == "a"


def test_no_more_idle_ones_are_kept_than_128() -> None:
    """Small ones take their place too: a worker over a million of them stays as it is."""
    cache: ImageCache[Picture] = ImageCache(10**9, 10**9)
    loads = Loads(1)
    for number in [*range(200), 199, 72, 71]:
        with cache.hold(number, lambda: loads.of(str(number))):
            pass
    assert loads.names[200:] == ["71"]
