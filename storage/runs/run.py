"""A run: one directory, or one prefix of an object store, with its settings, its plan, its staging area and its parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from storage.errors import DamagedError, UserError
from storage.images.lookup import EMBEDDED
from storage.naming import labelled_part, part_label, part_name
from storage.question import Question
from storage.runs import plan
from storage.runs.cancellation import CANCELLED, Cancellable
from storage.runs.plan import Plan, Slice
from storage.runs.staging import StagingArea
from storage.settings import MAX_SETTINGS, ImagePlaces, ModelFacts, RunSettings
from storage.stores.location import join, resolve_location
from storage.stores.store import DirectoryStore, open_store

_RUN, _MODEL, _SUMMARY = ".run/run.json", ".run/model.json", ".run/summary.json"
# What in `.run` may be left where run.json is not, and would be taken for the next run's.
_REMAINS = ("plan", "parts", "model.json", "summary.json", "cancelled.json")


@dataclass(frozen=True, slots=True)
class _Summary:
    """What of summary.json is read again."""

    generations: int = 1
    parts_planned: int = 0


_TEXT, _SUMMARY_TYPE = TypeAdapter(str), TypeAdapter(_Summary)


class Run(StagingArea, Cancellable):
    """Access to a run. Holds no state that the files do not: any number of processes may have one open.

    It is known by what its run.json says. Where that is another one by now, whatever is written through this object raises
    ReplacedError; so does `refresh`.
    """

    def __init__(self, location: str, settings: RunSettings) -> None:
        super().__init__(open_store(location), settings)
        self.location = location
        self._generations: list[str] = []
        self._plan = Plan((), {})
        self._retried: dict[str, int] | None = None
        self._questions = lru_cache(maxsize=8)(self._read_questions)

    @classmethod
    def open(cls, location: str | Path) -> Run:
        """Open an existing run, by its directory or URL. Raises UserError where there is none."""
        location = resolve_location(location)
        store = open_store(location)
        try:
            data = store.get(_RUN, MAX_SETTINGS)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{location} holds no run: there is no {_RUN} in it") from None
        except DamagedError as error:
            raise UserError(str(error)) from None
        run = cls(location, RunSettings.decode(data, store.address(_RUN)))
        run.store.hold(_RUN, data)
        return run

    @classmethod
    def create(cls, location: str | Path, settings: RunSettings) -> Run:
        """Create a run, or open the one that is there. The caller compares the settings. Raises UserError."""
        location = resolve_location(location)
        data = settings.model_dump_json(indent=1).encode()
        if len(data) > MAX_SETTINGS:
            raise UserError(f"the settings have {len(data):,} bytes, more than {MAX_SETTINGS:,}: use a shorter --prompt")
        store = open_store(location)
        there = store.list(".run")
        remains = [n for n in _REMAINS if n in there and (n.endswith(".json") or store.list(f".run/{n}"))]
        if remains and not store.exists(_RUN):
            raise UserError(
                f"{location} holds what is left of a run whose {_RUN} is gone ({', '.join(remains)}): remove "
                f"{store.address('.run')}, or choose another --output-dir"
            )
        left = [".run/refusals", *(f".run/staging/{name}" for name in store.list(".run/staging"))]
        if store.put_new(_RUN, data):
            for directory in left:  # by workers of a run that was removed from here
                store.delete_directory(directory)
        return cls.open(location)

    def relocate(self, images: ImagePlaces) -> None:
        """Have everybody look for the run's images in another place; whoever has it open opens it again."""
        written = json.loads(self.store.get(_RUN, MAX_SETTINGS))
        self.store.put(_RUN, json.dumps(written | {"relocated": images.model_dump()}, indent=1).encode())

    def discard(self) -> None:
        """Remove a run that has no part; its run.json last, so that a command that dies meanwhile can be given again."""
        for name in self.store.list(".run/staging"):
            self.store.delete_directory(f".run/staging/{name}")
        for name in self.store.list(".run/plan"):
            self.store.delete_directory(f".run/plan/{name}") if "." not in name else self.store.delete(f".run/plan/{name}")
        for directory in (".run/refusals", ".run/retries", ".run/parts", EMBEDDED):
            self.store.delete_directory(directory)
        for key in (_MODEL, _SUMMARY, CANCELLED, _RUN):
            self.store.delete(key)

    @property
    def images(self) -> ImagePlaces:
        """Where the run's images lie now: those of its table in the run itself, wherever that is."""
        if self.settings.embedded_images:
            return ImagePlaces(images_dir=self.location, image_roots=())
        return self.settings.images

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
        if not self._plan.slices:
            self.refresh()
        return self._plan.slices

    def refresh(self) -> bool:
        """Look whether the plan has grown by a generation, as a retry makes one; tell whether it has. Raises ReplacedError."""
        self.store.check()
        names = plan.generations(self.store)
        if names == self._generations:
            return False
        self._plan, self._retried = plan.read_plan(self.store, self.run_id), None
        self._generations = names
        return True

    @property
    def retried(self) -> Mapping[str, int]:
        """The questions that were planned again, each with its last part: an earlier part's word on it does not count."""
        if self._retried is None:
            later = (piece for piece in self.slices if piece.is_retry)
            self._retried = {q.question_id: s.part for s in later for q in plan.read_questions(self.store, s)}
        return self._retried

    def settings_by(self, generation: int | None = None) -> RunSettings:
        """Return the settings as of a generation, or as they are now: a table that has grown takes the first one's place."""
        tables = [t for of, t in self._plan.tables.items() if generation is None or of <= generation] if self.slices else []
        return self.settings.model_copy(update=asdict(tables[-1])) if tables else self.settings

    @property
    def next_generation(self) -> int:
        """The number of the generation that is planned next, as of the last `refresh`."""
        return len(self._generations)

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
        try:
            return plan.read_questions(self.store, self.slice(part))
        except FileNotFoundError:
            self.store.check()  # raises ReplacedError where the whole run is gone
            raise

    # The model

    def pin_model(self, facts: ModelFacts) -> ModelFacts:
        """Record what the first worker loaded; return what is recorded, which a later worker compares with its own."""
        self.store.put_new(_MODEL, facts.model_dump_json(indent=1).encode())
        recorded = self.model_facts()
        assert recorded is not None
        return recorded

    def model_facts(self) -> ModelFacts | None:
        """Return what the first worker loaded; None before there was one. Raises DamagedError."""
        try:
            return ModelFacts.decode(self.store.get(_MODEL, MAX_SETTINGS), self.store.address(_MODEL))
        except FileNotFoundError:
            return None

    def note_refusal(self, worker: str, message: str) -> None:
        """Record that a worker cannot compute this run, for `producer status` to show."""
        self.store.put(_refusal(worker), json.dumps(message).encode())

    def withdraw_refusal(self, worker: str) -> None:
        """Remove a worker's refusal: it has another model now."""
        self.store.delete(_refusal(worker))

    def refusals(self) -> dict[str, str]:
        """Return the workers that cannot compute this run, with their reasons."""
        found = {}
        for name in self.store.list(".run/refusals"):
            key = f".run/refusals/{name}"
            with suppress(FileNotFoundError):  # withdrawn at this moment
                try:
                    found[name.removesuffix(".json")] = _TEXT.validate_json(self.store.get(key, MAX_SETTINGS))
                except ValueError:
                    raise DamagedError(f"{self.store.address(key)} is damaged: remove it") from None
        return found

    def label(self, part: int) -> str:
        """Return a part's zero-padded number."""
        return part_label(part, self.settings.part_digits)

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
        labels = (name.removesuffix(".json") for name in self.store.list(".run/parts") if name.endswith(".json"))
        return {part for label in labels if (part := labelled_part(label)) is not None and label == self.label(part)}

    # The end

    def is_finished(self) -> bool:
        """Tell whether every part is published and described and the summary is written, of the whole plan as it is now."""
        try:
            summary = _SUMMARY_TYPE.validate_json(self.store.get(_SUMMARY, MAX_SETTINGS))
        except (FileNotFoundError, ValueError, DamagedError):  # a damaged one is written anew
            return False
        # A collector that began before a retry may write its summary after it.
        if summary.generations != max(1, len(plan.generations(self.store))):
            return False
        # A sidecar may be lost later: then a collector describes its part again, or has it computed where that is lost too.
        return len(self.parts_with_sidecar()) >= summary.parts_planned

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished, as far as this object knows the plan."""
        body = {**summary, "generations": len(self._generations)}
        self.store.put(_SUMMARY, json.dumps(body, indent=1).encode())

    def withdraw_summary(self) -> None:
        """Take the mark away: a part must be computed."""
        self.store.delete(_SUMMARY)


def _refusal(worker: str) -> str:
    return f".run/refusals/{worker.replace('/', '_')}.json"


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
