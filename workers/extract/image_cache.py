"""Decoded images: each decoded once for all its questions in flight, few at a time, bounded in bytes.

A worker has hundreds of task threads. Without a bound each could decode a photograph of 100 megapixels, 300 MB, at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that says how much memory it holds."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        ...


T = TypeVar("T", bound=Sized)
R = TypeVar("R")
_IDLE_IMAGES = 128


@dataclass(slots=True)
class _Entry(Generic[T]):
    loaded: Future[T] = field(default_factory=Future)
    users: int = 0
    nbytes: int = 0  # 0 until it is loaded


class ImageCache(Generic[T]):
    """Images in use, at most `max_bytes` and one more; and the 128 used last, at most `idle_bytes`. Thread-safe.

    As many are loaded at a time as there are cores, and as many apart: those that may take long hold up no others. While
    those in use exceed the bound, none is loaded: questions wait in their threads, the engine frees what it finishes.
    """

    def __init__(self, max_bytes: int, idle_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_idle_bytes = idle_bytes
        self._used: dict[Hashable, _Entry[T]] = {}
        self._used_bytes = 0
        self._idle: OrderedDict[Hashable, _Entry[T]] = OrderedDict()
        self._idle_bytes = 0
        self._changed = threading.Condition()
        cores = max(2, len(os.sched_getaffinity(0)))
        self._loaders, self._apart = threading.BoundedSemaphore(cores), threading.BoundedSemaphore(cores)
        self._begun: dict[Hashable, float] = {}

    def loading_since(self) -> float | None:
        """Return when the oldest load that has not ended began, on the wall clock."""
        return min(self._begun.copy().values(), default=None)

    def begin(self, key: Hashable) -> None:
        """Note that a load goes on with another image."""
        self._begun[key] = time.time()

    @contextmanager
    def hold(self, key: Hashable, load: Callable[[], T | None], load_apart: Callable[[], T]) -> Iterator[T]:
        """Yield an image, from memory or loaded now; it is kept at least until the block ends.

        `load_apart` loads it where `load` returns None, since it may take long. Whoever waits for an image that cannot be
        loaded gets the error; it is not kept.
        """
        entry, mine = self._take(key)
        try:
            if mine:
                self._load(key, entry, load, load_apart)
            yield entry.loaded.result()
        finally:
            self._leave(key, entry)

    def _take(self, key: Hashable) -> tuple[_Entry[T], bool]:
        """Return an image's entry, and whether it is new: for the caller to load."""
        with self._changed:
            entry = self._used.get(key)
            known = entry is not None
            if entry is None and (entry := self._idle.pop(key, None)) is not None:
                self._idle_bytes -= entry.nbytes
                known = True
            if entry is None:
                entry = _Entry()
            if not entry.users:
                self._used[key] = entry
                self._used_bytes += entry.nbytes
            entry.users += 1
            return entry, not known

    def _leave(self, key: Hashable, entry: _Entry[T]) -> None:
        with self._changed:
            entry.users -= 1
            if not entry.users and self._used.get(key) is entry:
                del self._used[key]
                self._used_bytes -= entry.nbytes
                self._idle[key] = entry
                self._idle_bytes += entry.nbytes
                while len(self._idle) > _IDLE_IMAGES or self._idle_bytes > self._max_idle_bytes:
                    self._idle_bytes -= self._idle.popitem(last=False)[1].nbytes
            self._changed.notify_all()

    def _load(self, key: Hashable, entry: _Entry[T], load: Callable[[], T | None], load_apart: Callable[[], T]) -> None:
        try:
            image = self._within(self._loaders, key, load)
            if image is None:
                image = self._within(self._apart, key, load_apart)
        except BaseException as error:  # noqa: BLE001  (every question that waits for this image hears of it)
            with self._changed:
                del self._used[key]
            entry.loaded.set_exception(error)
            return
        with self._changed:
            entry.nbytes = image.nbytes
            self._used_bytes += entry.nbytes
        entry.loaded.set_result(image)

    def _within(self, places: threading.BoundedSemaphore, key: Hashable, load: Callable[[], R]) -> R:
        with places:
            with self._changed:
                self._changed.wait_for(lambda: self._used_bytes <= self._max_bytes)
            self._begun[key] = time.time()
            try:
                return load()
            finally:
                del self._begun[key]
