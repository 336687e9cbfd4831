"""Presence: each process notes that it lives, what it serves and how far it is; in Redis for `producer status`, in a file for
`workers health`.

The file is for this machine alone: a container's health must not hang on Redis to see a dead engine. The key in Redis goes by
itself when its process does.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from kombu.exceptions import OperationalError
from pydantic import Field, TypeAdapter, ValidationError
from redis.exceptions import RedisError

from storage.errors import UserError
from storage.stores.location import is_within

logger = logging.getLogger(__name__)
KEY = "halp:worker:"
_MAX_NOTE = 1 << 20  # bytes; a note of ours has a thousandth of it
_MAX_PROCESSES = 10_000
_PAGE = 20  # notes in one round trip
_MOST_ROOTS = 50  # that are told
# What somebody else wrote may be anything: it is shown to people, and counted with.
_LONGEST = 4096  # characters
Line = Annotated[str, Field(max_length=_LONGEST)]
Number = Annotated[int, Field(ge=0, le=1 << 62)]
Ticks = Annotated[int, Field(ge=-1, le=1 << 62)]
Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
_FILE_INTERVAL, _REDIS_INTERVAL, TTL = 5.0, 10.0, 35  # seconds


@dataclass(frozen=True, slots=True)
class Presence:
    """What a process says of itself. Times are on its wall clock."""

    name: Line
    pid: Number
    ticks: Ticks  # when the process began, as the kernel counts: another one may get its number
    started: Time
    seen: Time = 0.0
    serves: Line = ""  # the prefix of a model's queues; empty without an engine
    former: Line = ""  # that of the same model's queues in runs that an earlier version began
    collects: bool = False
    model: Line = ""
    dtype: Line = ""
    device: Line = ""
    gpu: Line = ""
    whole: bool = False  # it computes whole prompts: its model's images cannot be shared
    loading_since: Time | None = None
    busy_since: Time | None = None
    answered: Time | None = None
    image_since: Time | None = None  # when the oldest image began that is being read or decoded
    done: Number = 0  # questions since it began
    swept: Time | None = None
    computed: Number = 0  # questions that the engine computed, in so many batches, with so many image prefixes
    batches: Number = 0
    prefixes: Number = 0
    engine_seconds: Time = 0.0  # that it took for them, and how much of that for drift certificates
    exact_seconds: Time = 0.0
    retrying: dict[Line, Number] = field(default_factory=dict)  # run id to its questions to be tried again here
    again: dict[Line, Line] = field(default_factory=dict)  # run id to why one was last tried again: `(3 of 6): engine_error: …`
    waits: dict[Line, Line] = field(default_factory=dict)  # runs that do not go on here: location to the reason
    data_roots: tuple[Line, ...] | None = None  # that it keeps to; None where it does not say, as an earlier version
    gpu_memory_used: Number | None = None  # bytes, of the GPU, by whomever
    gpu_memory_total: Number | None = None
    gpu_busy: Time | None = None  # of the last second or so

    def serves_queues(self, prefix: str) -> bool:
        """Tell whether this process serves the queues that begin so."""
        return prefix in {self.serves, self.former} - {""}

    @property
    def state(self) -> str:
        """Return what it does now, in a word."""
        if self.serves and (self.loading_since is not None or not self.device):
            return "loading"
        return "busy" if self.busy_since is not None else "ready"

    def may_touch(self, location: str) -> bool:
        """Tell whether a resolved location lies in its data roots, as far as it says which they are."""
        return self.data_roots is None or any(is_within(location, root) for root in self.data_roots)


_presence = TypeAdapter(Presence)


def of_this_process(name: str) -> Presence:
    """Return the beginning of this process's presence."""
    return Presence(name, os.getpid(), ticks_of(os.getpid()), time.time())


def telling(roots: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return data roots as they are announced; None where they are too many, or not text: nobody could read the note."""
    if len(roots) > _MOST_ROOTS or any(len(root) > _LONGEST or not _is_text(root) for root in roots):
        return None
    return roots


def _is_text(path: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in path)  # of a path that is not UTF-8


def ticks_of(pid: int) -> int:
    """Return when a process began, in the kernel's ticks; 0 where there is none, -1 where the kernel does not say."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state == "Z" else int(fields[18])  # a zombie is dead
    except FileNotFoundError:
        return 0 if Path("/proc/self/stat").exists() else -1
    except (OSError, ValueError, IndexError):
        return 0


class Announcer:
    """Repeats a process's presence until it is stopped, in the file and in Redis from a thread each: one may hang."""

    def __init__(self, look: Callable[[], Presence], directory: Path, redis: Callable[[], Any]) -> None:
        self._look = look
        self._redis = redis
        self._path = _private(directory) / f"{os.getpid()}.json"
        self._changed, self._ended = threading.Event(), threading.Event()
        jobs = ((self._write, _FILE_INTERVAL), (self._announce, _REDIS_INTERVAL))
        self._threads = [threading.Thread(target=self._repeat, args=job, daemon=True) for job in jobs]

    def start(self) -> None:
        """Begin."""
        for presence in present_here(self._path.parent, clean=True):
            logger.debug("%s is here too", presence.name)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Take both notes back."""
        self._ended.set()
        self._threads[0].join()
        self._path.unlink(missing_ok=True)
        with suppress(OperationalError, RedisError, OSError), self._redis() as client:
            client.delete(KEY + self._look().name)

    def _repeat(self, say: Callable[[], None], interval: float) -> None:
        while True:
            try:
                say()
            except Exception as error:  # noqa: BLE001  (a full disk, a broker that is away, whatever it is: say it later)
                logger.debug("cannot note that this process lives: %s", type(error).__name__)
            if self._ended.wait(interval):
                return

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self._now())))
        partial.replace(self._path)

    def _announce(self) -> None:
        presence = self._now()
        with self._redis() as client:
            client.set(KEY + presence.name, json.dumps(asdict(presence)), ex=TTL)

    def _now(self) -> Presence:
        return replace(self._look(), seen=time.time())


def present_here(directory: Path, *, clean: bool = False) -> list[Presence]:
    """Return the processes of this machine that have noted themselves and live; `clean` removes the notes of dead ones."""
    found = []
    for path in sorted(directory.glob("*.json")):
        presence = decode(_read(path))
        if presence is not None and ticks_of(presence.pid) == presence.ticks:
            found.append(presence)
        elif clean:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda presence: presence.name)


def present(client: Any) -> list[Presence]:
    """Return every process that has lately announced itself in Redis, by name."""
    keys = list(itertools.islice(client.scan_iter(match=KEY + "*", count=500), _MAX_PROCESSES))
    found = []
    for start in range(0, len(keys), _PAGE):
        page = keys[start : start + _PAGE]
        for key, data in zip(page, client.mget(page)):
            presence = decode(data)
            if presence is not None and key == (KEY + presence.name).encode():
                found.append(presence)
    return sorted(found, key=lambda presence: presence.name)


def decode(data: str | bytes | None) -> Presence | None:
    """Return what was noted; None where it is nothing of ours."""
    if not data or len(data) > _MAX_NOTE:
        return None
    try:
        return _presence.validate_json(data, strict=True)
    except ValidationError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _private(directory: Path) -> Path:
    """Make a directory that only this user may write to. Raises UserError where it is somebody else's."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise UserError(f"HALP_RUNTIME_DIR={directory} cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(f"HALP_RUNTIME_DIR={directory} is not a directory that this user alone may write to")
    return directory
