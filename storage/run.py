"""A run: one directory, or one prefix of an object store, with its settings, its plan, its staging area and its parts."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from storage import plan
from storage.errors import DamagedError, UserError
from storage.location import join, resolve_location
from storage.naming import part_label, part_name
from storage.plan import Question, Slice
from storage.sample import Failure, Sample, decode_failure, decode_sample, encode_failure, encode_sample
from storage.settings import ModelFacts, RunSettings
from storage.store import SCRATCH, DirectoryStore, open_store

_RUN, _MODEL, _SUMMARY = ".run/run.json", ".run/model.json", ".run/summary.json"
_CANCELLED = ".run/cancelled.json"
_RESULT, _FAILURE = ".safetensors", ".json"
_SUSPECT, _DEATH = ".suspect", ".death-"
_CERTIFICATE = "certificate"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cancellation:
    """What cancels a run: the file's bytes, and the time in it on the wall clock of whoever wrote it."""

    note: bytes
    at: float | None


class Run:
    """Access to a run. Holds no state that the files do not: any number of processes may have one open."""

    def __init__(self, location: str, settings: RunSettings) -> None:
        self.location = location
        self.settings = settings
        self.store = open_store(location)
        self._generations: list[str] = []
        self._slices: tuple[Slice, ...] = ()
        self._retried: dict[str, int] | None = None
        self._questions = lru_cache(maxsize=8)(self._read_questions)

    @classmethod
    def open(cls, location: str | Path) -> Run:
        """Open an existing run, by its directory or URL. Raises UserError where there is none."""
        location = resolve_location(location)
        store = open_store(location)
        try:
            data = store.get(_RUN)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{location} holds no run: there is no {_RUN} in it") from None
        try:
            return cls(location, RunSettings.model_validate_json(data))
        except ValidationError as error:
            raise UserError(
                f"{store.address(_RUN)} was written by another version of this software: {error}"
            ) from error

    @classmethod
    def create(cls, location: str | Path, settings: RunSettings) -> Run:
        """Create a run, or open the one that is there. The caller compares the settings."""
        location = resolve_location(location)
        open_store(location).put_new(_RUN, settings.model_dump_json(indent=1).encode())
        return cls.open(location)

    @property
    def run_id(self) -> str:
        """The run's unique id."""
        return self.settings.run_id

    @property
    def output_dir(self) -> Path:
        """The run's directory. Raises UserError where it lies in an object store."""
        if not isinstance(self.store, DirectoryStore):
            raise UserError(f"{self.location} is no directory of this machine: that is not possible in an object store")
        return self.store.root

    # The plan

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The plan's slices in order, as of the last `refresh`; empty until the plan is written."""
        if not self._slices:
            self.refresh()
        return self._slices

    def refresh(self) -> bool:
        """Look whether the plan has grown by a generation, as a retry makes one; tell whether it has."""
        names = plan.generations(self.store)
        if names == self._generations:
            return False
        self._slices, self._retried = plan.read_slices(self.store), None
        self._generations = names
        return True

    @property
    def retried(self) -> Mapping[str, int]:
        """The questions that were planned again, each with its last part: an earlier part's word on it does not count."""
        if self._retried is None:
            later = (piece for piece in self.slices if piece.generation > 0)
            self._retried = {q.question_id: s.part for s in later for q in plan.read_questions(self.store, s)}
        return self._retried

    def slice(self, part: int) -> Slice:
        """Return one slice, of a new generation too. Raises KeyError."""
        while True:
            pieces = self.slices
            if 1 <= part <= len(pieces) and pieces[part - 1].part == part:  # they are numbered from 1, without gaps
                return pieces[part - 1]
            if not self.refresh():
                raise KeyError(part)

    def questions(self, part: int) -> tuple[Question, ...]:
        """Return the questions of a slice, the last few slices from memory."""
        return self._questions(part)

    def _read_questions(self, part: int) -> tuple[Question, ...]:
        return plan.read_questions(self.store, self.slice(part))

    # The model

    def agree_on_model(self, facts: ModelFacts) -> ModelFacts:
        """Record what the first worker loaded; return what is recorded, which a later worker compares with its own."""
        self.store.put_new(_MODEL, facts.model_dump_json(indent=1).encode())
        recorded = self.model_facts()
        assert recorded is not None
        return recorded

    def model_facts(self) -> ModelFacts | None:
        """Return what the first worker loaded; None before there was one."""
        try:
            return ModelFacts.model_validate_json(self.store.get(_MODEL))
        except FileNotFoundError:
            return None

    def note_refusal(self, worker: str, message: str) -> None:
        """Record that a worker cannot compute this run, for `producer status` to show."""
        self.store.put(f".run/refusals/{worker}.json", json.dumps(message).encode())

    def withdraw_refusal(self, worker: str) -> None:
        """Remove a worker's refusal: it has another model now."""
        self.store.delete(f".run/refusals/{worker}.json")

    def refusals(self) -> dict[str, str]:
        """Return the workers that cannot compute this run, with their reasons."""
        names = self.store.list(".run/refusals")
        return {n.removesuffix(".json"): json.loads(self.store.get(f".run/refusals/{n}")) for n in names}

    # The staging area: one file per finished question

    def stage_sample(self, part: int, sequence: int, sample: Sample) -> None:
        """Stage a question's result. The first one stays."""
        self._stage(part, self._staged_key(part, sequence, _RESULT), encode_sample(sample))

    def stage_failure(self, part: int, sequence: int, failure: Failure) -> None:
        """Stage a question's permanent failure. A staged result beats it."""
        self._stage(part, self._staged_key(part, sequence, _FAILURE), encode_failure(failure))

    def _stage(self, part: int, key: str, data: bytes) -> None:
        # A second computation may end later than the part: then a collector removes the directory under our hands,
        # or is gone already and nobody would remove the file.
        try:
            self.store.put_new(key, data)
        except OSError:
            if not self.store.exists(self.sidecar_key(part)):
                raise
        if self.store.exists(self.sidecar_key(part)):
            self.delete_staging(part)

    def staged(self, part: int) -> dict[int, bool]:
        """Return the finished questions of an unpublished slice: sequence to whether it has a result."""
        found: dict[int, bool] = {}
        for name in self.store.list(self._staging_directory(part)):
            stem, _, suffix = name.partition(".")
            if stem.isdecimal() and f".{suffix}" in {_RESULT, _FAILURE}:
                found[int(stem)] = found.get(int(stem), False) or f".{suffix}" == _RESULT
        return found

    def has_finished(self, part: int, sequence: int) -> bool:
        """Tell whether a question is in a published part, or has a staged result or failure."""
        staged = (self._staged_key(part, sequence, suffix) for suffix in (_RESULT, _FAILURE))
        return any(map(self.store.exists, staged)) or self.store.exists(self.sidecar_key(part))

    # Crashes: marks beside the staged files, which no worker keeps in its memory and no queue can lose

    def note_death(self, part: int, sequence: int, *, alone: bool, **facts: str) -> int:
        """Record that the engine died under a question; only where it was alone in it that counts. Return how often it was."""
        self._stage(part, self._staged_key(part, sequence, _SUSPECT), b"{}")
        if alone:
            key = self._staged_key(part, sequence, f"{_DEATH}{secrets.token_hex(4)}")
            self._stage(part, key, json.dumps(facts).encode())
        return len(self._deaths(part, sequence))

    def deaths_alone(self, part: int, sequence: int) -> int | None:
        """Return how often the engine died with a question alone in it; None for one that was never there at a death."""
        if not self.store.exists(self._staged_key(part, sequence, _SUSPECT)):
            return None
        return len(self._deaths(part, sequence))

    def _deaths(self, part: int, sequence: int) -> list[str]:
        return [n for n in self.store.list(self._staging_directory(part)) if n.startswith(f"{sequence:06d}{_DEATH}")]

    def claim_certificate(self, part: int) -> bool:
        """Tell whether a slice's drift certificate is the caller's to compute: the first one's, and nobody's after it."""
        return self.store.put_new(f"{self._staging_directory(part)}/{_CERTIFICATE}-{self.run_id}", b"{}")

    def read_samples(self, part: int, sequences: Iterable[int]) -> Iterator[Sample]:
        """Yield staged results in the order asked for. A damaged one is removed, to be computed again: DamagedError."""
        return self._read_staged([self._staged_key(part, s, _RESULT) for s in sequences], decode_sample)

    def read_failure(self, part: int, sequence: int) -> Failure:
        """Return one staged failure, as `read_failures` does."""
        return next(self.read_failures(part, [sequence]))

    def read_failures(self, part: int, sequences: Iterable[int]) -> Iterator[Failure]:
        """Yield staged failures in the order asked for. A damaged one is removed, to be computed again: DamagedError."""
        return self._read_staged([self._staged_key(part, s, _FAILURE) for s in sequences], decode_failure)

    def _read_staged(self, keys: Sequence[str], decode: Callable[[bytes], T]) -> Iterator[T]:
        for key, data in zip(keys, self.store.get_many(keys)):
            try:
                yield decode(data)
            except DamagedError as error:
                self.store.delete(key)
                raise DamagedError(f"{self.store.address(key)}: {error}; removed, to be computed again") from error

    def delete_staging(self, part: int) -> None:
        """Remove a published slice's staged files."""
        self.store.delete_directory(self._staging_directory(part))

    def staging_directories(self) -> list[str]:
        """Return the labels of the slices that have a staging directory."""
        return self.store.list(".run/staging")

    def label(self, part: int) -> str:
        """Return a part's zero-padded number."""
        return part_label(part, self.settings.part_digits)

    def _staging_directory(self, part: int) -> str:
        return f".run/staging/{self.label(part)}"

    def _staged_key(self, part: int, sequence: int, suffix: str) -> str:
        return f"{self._staging_directory(part)}/{sequence:06d}{suffix}"

    def has_leftovers(self) -> bool:
        """Tell whether a staged or unfinished file is there: of a run that is finished, what a killed process left."""
        return bool(self.staging_directories() or self.store.list(SCRATCH))

    # The parts

    def part_name(self, part: int) -> str:
        """Return a part's file name."""
        return part_name(self.settings.model_slug, part, self.settings.part_digits)

    def part_path(self, part: int) -> Path:
        """Return where a part is published. Raises UserError where the run lies in an object store: see `local_part`."""
        return self.output_dir / self.part_name(part)

    def local_part(self, part: int) -> AbstractContextManager[Path]:
        """Yield a published part as a file of this machine, to be read only. Raises FileNotFoundError."""
        return self.store.local_copy(self.part_name(part))

    def sidecar_key(self, part: int) -> str:
        """Return the key of a part's sidecar."""
        return f".run/parts/{self.label(part)}.json"

    def parts_with_sidecar(self) -> set[int]:
        """Return the numbers of the parts that are published and described."""
        return {int(name.removesuffix(".json")) for name in self.store.list(".run/parts")}

    # The end

    def is_finished(self) -> bool:
        """Tell whether every part is published and described and the summary is written, of the whole plan as it is now."""
        try:
            summary = json.loads(self.store.get(_SUMMARY))
        except (FileNotFoundError, ValueError):  # a damaged one is written anew
            return False
        # A collector that began before a retry may write its summary after it.
        if summary.get("generations", 1) != max(1, len(plan.generations(self.store))):
            return False
        # A sidecar may be lost later: then a collector describes its part again, or has it computed where that is lost too.
        return bool(len(self.parts_with_sidecar()) >= summary.get("parts_planned", 0))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished, as far as this object knows the plan."""
        body = {**summary, "generations": len(self._generations)}
        self.store.put(_SUMMARY, json.dumps(body, indent=1).encode())

    def withdraw_summary(self) -> None:
        """Take the mark away: a part must be computed."""
        self.store.delete(_SUMMARY)

    def cancel(self) -> bool:
        """Have nobody begin another question of this run; return False where that is so already.

        Each call leaves a note of its own: a command that takes back an earlier one must see that this one is another.
        """
        note = json.dumps({"at": time.time(), "id": secrets.token_hex(8)}).encode()
        if self.store.put_new(_CANCELLED, note):
            return True
        self.store.put(_CANCELLED, note)
        return False

    def is_cancelled(self) -> bool:
        """Tell whether the run is cancelled."""
        return self.store.exists(_CANCELLED)

    def cancellation(self) -> Cancellation | None:
        """Return what cancels the run; None where nothing does."""
        try:
            note = self.store.get(_CANCELLED)
        except FileNotFoundError:
            return None
        try:
            at = json.loads(note)["at"]
        except (ValueError, TypeError, KeyError):  # of an earlier version, which noted no time
            at = None
        return Cancellation(note, at if isinstance(at, float) else None)

    def withdraw_cancellation(self, only: Cancellation | None = None) -> None:
        """Let the run go on; with `only` where that is still what cancels it."""
        if only is None:
            self.store.delete(_CANCELLED)
            return
        aside = f"{_CANCELLED}.{secrets.token_hex(4)}"
        self.store.move(_CANCELLED, aside)  # first, and looked at then: whoever cancels in between is not overwritten
        try:
            note = self.store.get(aside)
        except FileNotFoundError:  # taken back already
            return
        if note != only.note:
            self.store.put_new(_CANCELLED, note)
        self.store.delete(aside)


def is_run(location: str | Path) -> bool:
    """Tell whether a resolved location holds a run."""
    return open_store(location).exists(_RUN)


def part_names(location: str) -> list[str]:
    """Return the names of all that a reader of a resolved location takes for parts, whosever they are."""
    return [name for name in open_store(location).list("") if name.endswith(".h5")]


def find_runs(location: str, depth: int, report: Callable[[str, OSError], object]) -> Iterator[str]:
    """Yield the locations of the runs at or below a resolved location, so many levels deep.

    A place that cannot be looked into is reported, and the others are found all the same.
    """
    store = open_store(location)
    try:
        if store.exists(_RUN):
            yield location
            return
        below = store.directories("") if depth else ()
    except OSError as error:
        report(location, error)
        return
    for name in below:
        if not name.startswith("."):
            yield from find_runs(join(location, name), depth - 1, report)
