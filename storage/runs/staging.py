"""The staging area of a run: one file per finished question, and marks of the engine's crashes beside them.

Each says of which run and question it is, and is compared with the plan before anything is made of it: a file of something
else counts as damaged, is removed, and the question is computed again.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from pydantic import TypeAdapter

from storage.errors import DamagedError
from storage.identity import Identity, identity_of, settings_digests
from storage.naming import labelled_part
from storage.question import Question
from storage.runs.plan import Slice
from storage.sample import MAX_STAGED, Failure, Sample, decode_failure, decode_sample, encode_failure, encode_sample
from storage.settings import RunSettings
from storage.stores.store import SCRATCH, Store

_STAGING = ".run/staging"
_RESULT, _FAILURE = ".safetensors", ".json"
_SUSPECT, _CRASH = ".suspect", ".death-"  # names in files
_CERTIFICATE = "certificate"
_MAX_MARK = 1 << 20  # bytes
_LISTED_SECONDS = 1.0  # how long a listing of a slice serves
_FACTS = TypeAdapter(dict[str, str])
_DECODE: dict[str, Callable[[bytes, Identity], Sample | Failure]] = {_RESULT: decode_sample, _FAILURE: decode_failure}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Listing:
    """The names staged in a slice and whether it was published, when that was last asked; this process's own names since.

    For a second, a missing name counts as missing: at worst a question is computed once more, and the first result stays.
    A name that is there is read before it counts.
    """

    at: float
    names: set[str]
    published: bool


class StagingArea(ABC):
    """What is staged of a run."""

    def __init__(self, store: Store, settings: RunSettings) -> None:
        self.store = store
        self.settings = settings
        self._listings: dict[int, _Listing] = {}
        self._listing_lock = threading.Lock()
        self._listing_locks: dict[int, threading.Lock] = {}

    @abstractmethod
    def slice(self, part: int) -> Slice:
        """Return one slice of the plan."""

    @abstractmethod
    def questions(self, part: int) -> tuple[Question, ...]:
        """Return the questions of a slice."""

    @abstractmethod
    def label(self, part: int) -> str:
        """Return a part's zero-padded number."""

    @abstractmethod
    def sidecar_key(self, part: int) -> str:
        """Return the key of a part's sidecar."""

    @cached_property
    def _digests(self) -> tuple[str, str]:
        return settings_digests(self.settings)

    def identity(self, part: int, sequence: int) -> Identity:
        """Return whose a staged file must be."""
        return identity_of(self.settings, self._digests, self.questions(part)[sequence])

    def stage_sample(self, part: int, sequence: int, sample: Sample) -> None:
        """Stage a question's result. The first one stays."""
        self._stage_once(part, sequence, _RESULT, encode_sample(sample, self.identity(part, sequence)))

    def stage_failure(self, part: int, sequence: int, failure: Failure) -> None:
        """Stage a question's permanent failure. A staged result beats it."""
        self._stage_once(part, sequence, _FAILURE, encode_failure(failure, self.identity(part, sequence)))

    def _stage_once(self, part: int, sequence: int, suffix: str, data: bytes) -> None:
        key = self._staged_key(part, sequence, suffix)

        def put() -> None:
            # What is there already may be of a run that was here before: then asking for it removes it.
            if not self.store.put_new(key, data) and not self._holds(part, sequence, suffix):
                self.store.put_new(key, data)

        self._stage(part, key, put)

    def _stage(self, part: int, key: str, put: Callable[[], object]) -> None:
        # A second computation may end later than the part: then a collector removes the directory under our hands,
        # or is gone already and nobody would remove the file.
        try:
            put()
        except OSError:
            if not self.store.exists(self.sidecar_key(part)):
                raise
        if self.store.exists(self.sidecar_key(part)):
            self.delete_staging(part)
        elif listing := self._listings.get(part):
            listing.names.add(key.rpartition("/")[2])

    def _list(self, part: int) -> _Listing:
        with self._listing_lock:
            lock = self._listing_locks.setdefault(part, threading.Lock())
        with lock:  # threads that ask for a slice at the same time wait for one listing; other slices do not
            now = time.monotonic()
            listing = self._listings.get(part)
            if listing is None or now - listing.at >= _LISTED_SECONDS:
                names = set(self.store.list(self._staging_directory(part)))
                listing = _Listing(now, names, self.store.exists(self.sidecar_key(part)))
                with self._listing_lock:
                    for old in [p for p, kept in self._listings.items() if now - kept.at >= _LISTED_SECONDS]:
                        del self._listings[old]
                        if old != part:
                            self._listing_locks.pop(old, None)
                    self._listings[part] = listing
            return listing

    def staged(self, part: int) -> dict[int, bool]:
        """Return the finished questions of an unpublished slice, by the files' names: sequence to whether it has a result."""
        found: dict[int, bool] = {}
        size = self.slice(part).size
        for name in self.store.list(self._staging_directory(part)):
            stem, _, suffix = name.partition(".")
            if not (stem.isascii() and stem.isdecimal() and f".{suffix}" in _DECODE and len(stem) <= 9):
                continue
            if (sequence := int(stem)) < size and stem == f"{sequence:06d}":
                found[sequence] = found.get(sequence, False) or f".{suffix}" == _RESULT
        return found

    def has_finished(self, part: int, sequence: int) -> bool:
        """Tell whether a question is in a published part, or has a staged result or failure of its own."""
        listing = self._list(part)
        seen = [suffix for suffix in _DECODE if f"{sequence:06d}{suffix}" in listing.names]
        if any(self._holds(part, sequence, suffix) for suffix in seen):
            return True
        # What was staged a moment ago and is gone may have been packed since.
        return bool(seen or listing.published) and self.store.exists(self.sidecar_key(part))

    def _holds(self, part: int, sequence: int, suffix: str) -> bool:
        """Tell whether a staged file is there and this question's; one that is not is removed."""
        try:
            next(self._read_staged(part, [sequence], suffix, _DECODE[suffix]))
        except (DamagedError, FileNotFoundError):
            return False
        return True

    # Crashes: marks beside the staged files, which no worker keeps in its memory and no queue can lose

    def note_crash(self, part: int, sequence: int, *, alone: bool, **facts: str) -> int:
        """Record that the engine died under a question; only where it was alone in it that counts. Return how often it was."""
        mark = {"identity": self.identity(part, sequence).text}
        key = self._staged_key(part, sequence, _SUSPECT)
        self._stage(part, key, lambda: self.store.put(key, json.dumps(mark).encode()))
        if alone:
            crash = self._staged_key(part, sequence, f"{_CRASH}{secrets.token_hex(4)}")
            self._stage(part, crash, lambda: self.store.put_new(crash, json.dumps(facts | mark).encode()))
        return self._crashes(part, sequence)

    def crashes_alone(self, part: int, sequence: int) -> int | None:
        """Return how often the engine died with a question alone in it; None for one that was never there at a crash."""
        key = self._staged_key(part, sequence, _SUSPECT)
        seen = key.rpartition("/")[2] in self._list(part).names
        if not seen or not self._is_mark(key, self.identity(part, sequence)):
            return None
        return self._crashes(part, sequence)

    def _crashes(self, part: int, sequence: int) -> int:
        directory, begin = self._staging_directory(part), f"{sequence:06d}{_CRASH}"
        names = [name for name in self.store.list(directory) if name.startswith(begin)]
        identity = self.identity(part, sequence)
        return sum(self._is_mark(f"{directory}/{name}", identity) for name in names)

    def _is_mark(self, key: str, identity: Identity) -> bool:
        try:
            identity.check(_FACTS.validate_json(self.store.get(key, _MAX_MARK)).get("identity"))
        except (FileNotFoundError, ValueError, DamagedError):  # of another run, or of nobody
            return False
        return True

    def claim_certificate(self, part: int) -> bool:
        """Tell whether a slice's drift certificate is the caller's to compute: the first one's, and nobody's after it."""
        return self.store.put_new(f"{self._staging_directory(part)}/{_CERTIFICATE}-{self.settings.run_id}", b"{}")

    # Reading

    def read_samples(self, part: int, sequences: Iterable[int]) -> Iterator[Sample]:
        """Yield staged results in the order asked for. A damaged one is removed, to be computed again: DamagedError."""
        return self._read_staged(part, list(sequences), _RESULT, decode_sample)

    def read_failure(self, part: int, sequence: int) -> Failure:
        """Return one staged failure, as `read_failures` does."""
        return next(self.read_failures(part, [sequence]))

    def read_failures(self, part: int, sequences: Iterable[int]) -> Iterator[Failure]:
        """Yield staged failures in the order asked for. A damaged one is removed, to be computed again: DamagedError."""
        return self._read_staged(part, list(sequences), _FAILURE, decode_failure)

    def _read_staged(
        self, part: int, sequences: Sequence[int], suffix: str, decode: Callable[[bytes, Identity], T]
    ) -> Iterator[T]:
        found = self.store.get_many([self._staged_key(part, s, suffix) for s in sequences], MAX_STAGED)
        for place, sequence in enumerate(sequences):
            try:
                result = decode(next(found), self.identity(part, sequence))
            except DamagedError as error:
                number = self._remove_damaged(part, sequences[place:], suffix)
                address = self.store.address(self._staged_key(part, sequence, suffix))
                more = f", as were {number - 1:,} more of its part" if number > 1 else ""
                raise DamagedError(f"{address}: {error}; removed, to be computed again{more}") from error
            yield result

    def _remove_damaged(self, part: int, sequences: Iterable[int], suffix: str) -> int:
        """Remove what is damaged or another run's, all at once; return how many files that were."""
        number = 0
        for sequence in sequences:
            key = self._staged_key(part, sequence, suffix)
            try:
                _DECODE[suffix](self.store.get(key, MAX_STAGED), self.identity(part, sequence))
            except DamagedError:
                self.store.delete(key)
                number += 1
            except FileNotFoundError:
                pass
        return number

    def delete_staging(self, part: int) -> None:
        """Remove a published slice's staged files."""
        self.store.delete_directory(self._staging_directory(part))

    def staging_directories(self) -> list[str]:
        """Return the labels of the slices that have a staging directory."""
        return [name for name in self.store.list(_STAGING) if labelled_part(name) is not None]

    def has_leftovers(self) -> bool:
        """Tell whether a staged or unfinished file is there: of a run that is finished, what a killed process left."""
        return bool(self.staging_directories() or self.store.list(SCRATCH))

    def _staging_directory(self, part: int) -> str:
        return f"{_STAGING}/{self.label(part)}"

    def _staged_key(self, part: int, sequence: int, suffix: str) -> str:
        return f"{self._staging_directory(part)}/{sequence:06d}{suffix}"
