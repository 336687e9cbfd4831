"""The cache of decoded images: loaded once, few at a time, bounded in bytes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from workers.extract.image_cache import ImageCache


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


def never() -> Picture:
    raise AssertionError("what was loaded is loaded again")


def test_no_more_are_loaded_at_a_time_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    cache: ImageCache[Picture] = ImageCache(10**9, 0)
    loads = Loads(1, 0.02)

    def use(number: int) -> None:
        with cache.hold(number, lambda: loads.of(str(number)), never):
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
        with cache.hold("c", lambda: loads.of("c"), never):
            third.set()

    thread = threading.Thread(target=use)
    with cache.hold("a", lambda: loads.of("a"), never) as first:
        with cache.hold(
            "b", lambda: loads.of("b"), never
        ):  # 120 of 100 bytes: one picture may exceed it, or none would ever fit
            thread.start()
            with cache.hold("a", lambda: loads.of("a"), never) as again:
                assert again is first
            assert not third.wait(0.2)
        assert third.wait(10)  # 60 of 100
    thread.join()
    assert loads.names == ["a", "b", "c"]


def test_one_that_is_larger_than_the_bound_is_loaded_and_not_kept() -> None:
    cache: ImageCache[Picture] = ImageCache(100, 100)
    loads = Loads(1000)
    for _ in range(2):
        with cache.hold("a", lambda: loads.of("a"), never) as picture:
            assert picture.nbytes == 1000
    assert loads.names == ["a", "a"]


def test_one_that_cannot_be_loaded_costs_no_place() -> None:
    cache: ImageCache[Picture] = ImageCache(100, 100)

    def fail() -> Picture:
        raise MemoryError("no room")

    for _ in range(20):
        with pytest.raises(MemoryError, match="no room"), cache.hold("a", fail, never):
            pass
    with cache.hold("a", lambda: Picture("a", 1), never) as picture:
        assert picture.name == "a"


def test_no_more_idle_ones_are_kept_than_128() -> None:
    """Small ones take their place too: a worker over a million of them stays as it is."""
    cache: ImageCache[Picture] = ImageCache(10**9, 10**9)
    loads = Loads(1)
    for number in [*range(200), 199, 72, 71]:
        with cache.hold(number, lambda: loads.of(str(number)), never):
            pass
    assert loads.names[200:] == ["71"]


def test_those_that_are_slow_hold_up_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are places: the others are loaded meanwhile, and the clock of the oldest is shown."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    cache: ImageCache[Picture] = ImageCache(10**9, 0)
    go = threading.Event()
    begun = time.time()

    def slow(number: int) -> str:
        def load() -> Picture:
            assert go.wait(20)
            return Picture(str(number), 1)

        with cache.hold(number, lambda: None, load) as picture:
            return picture.name

    assert cache.loading_since() is None
    with ThreadPoolExecutor(8) as pool:
        names = [pool.submit(slow, number) for number in range(8)]
        for number in range(100, 110):
            with cache.hold(number, lambda: Picture("quick", 1), never) as picture:
                assert picture.name == "quick"
        since = cache.loading_since()
        assert since is not None
        assert begun <= since <= time.time()
        go.set()
        assert [name.result(20) for name in names] == [str(number) for number in range(8)]
    assert cache.loading_since() is None
