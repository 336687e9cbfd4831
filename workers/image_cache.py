"""Decoded images: each decoded once for all its questions in flight, few at a time, bounded in bytes.

A worker has hundreds of task threads. Without a bound each could decode a photograph of 100 megapixels, 300 MB, at once.
"""

from __future__ import annotations

import os
import threading
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


@dataclass(slots=True)
class _Entry(Generic[T]):
    loaded: Future[T] = field(default_factory=Future)
    users: int = 0
    nbytes: int = 0  # 0 until it is loaded


class ImageCache(Generic[T]):
    """Images in use, at most `max_bytes` and one more, and those used last, at most `idle_bytes`. Thread-safe.

    As many are loaded at a time as there are cores. While those in use exceed the bound, none is loaded: questions wait in
    their threads, the engine frees what it finishes.
    """

    def __init__(self, max_bytes: int, idle_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._idle_bytes = idle_bytes
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()
        self._in_use = 0  # bytes of the entries with users
        self._idle = 0  # bytes of those without
        self._changed = threading.Condition()
        self._loaders = threading.BoundedSemaphore(max(2, len(os.sched_getaffinity(0))))

    @contextmanager
    def hold(self, key: Hashable, load: Callable[[], T]) -> Iterator[T]:
        """Yield an image, from memory or loaded now; it is kept at least until the block ends.

        Whoever waits for an image that cannot be loaded gets the error; it is not kept.
        """
        with self._changed:
            entry = self._entries.get(key)
            mine = entry is None
            if entry is None:
                entry = self._entries[key] = _Entry()
            if not entry.users:
                self._idle -= entry.nbytes
                self._in_use += entry.nbytes
            entry.users += 1
            self._entries.move_to_end(key)
        try:
            if mine:
                self._load(key, entry, load)
            yield entry.loaded.result()
        finally:
            with self._changed:
                entry.users -= 1
                if not entry.users:
                    self._in_use -= entry.nbytes
                    self._idle += entry.nbytes
                    self._drop_idle()
                self._changed.notify_all()

    def _load(self, key: Hashable, entry: _Entry[T], load: Callable[[], T]) -> None:
        with self._loaders:
            with self._changed:
                self._changed.wait_for(lambda: self._in_use <= self._max_bytes)
            try:
                image = load()
            except BaseException as error:  # noqa: BLE001  (every question that waits for this image hears of it)
                with self._changed:
                    self._entries.pop(key, None)
                entry.loaded.set_exception(error)
                return
        with self._changed:
            entry.nbytes = image.nbytes
            self._in_use += entry.nbytes
        entry.loaded.set_result(image)

    def _drop_idle(self) -> None:
        """Drop the idle images that were used longest ago until the bound holds."""
        if self._idle <= self._idle_bytes:
            return
        for key in [key for key, entry in self._entries.items() if not entry.users]:
            self._idle -= self._entries.pop(key).nbytes
            if self._idle <= self._idle_bytes:
                return
