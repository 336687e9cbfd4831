"""The plan: generations of ordered questions, cut into slices. Slice k is part k.

Generation 0 is the dataset; each later one plans questions again that have failed, or the new questions of a table that has
grown, in parts of their own: a part is never changed. `plan/000.json` lists the slices of generation 0 with the digest of each;
it appears in one step, after its slice files, so a generation is whole or absent. A slice file has one JSON object a line, a
question each.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any

from pydantic import TypeAdapter, ValidationError

from storage.errors import DamagedError, UserError
from storage.naming import MAX_PART
from storage.question import Question
from storage.settings import faults
from storage.stores.store import Store

# Bytes that are read at most: a stranger's plan must not fill the memory. 350,000 slices, and 400,000 long questions in one.
MAX_LIST, MAX_SLICE = 1 << 26, 1 << 28
_LISTS = re.compile(r"(\d{3,9})\.json", re.ASCII)


@dataclass(frozen=True, slots=True)
class Grown:
    """A table that has got further questions: what takes the place of these settings of the run."""

    dataset: str
    dataset_sha256: str
    limit: int | None


Origin = tuple[str, int]  # the run and the number that a merged part was published as, and says that it is


@dataclass(frozen=True, slots=True)
class Slice:
    """A fixed run of questions that becomes one part."""

    part: int
    size: int
    key: str
    sha256: str
    generation: int = 0
    based_on: tuple[int, ...] = ()  # earlier parts that its questions are planned in too, and have failed in
    added: bool = False  # its questions are new ones, of a table that has grown
    origin: Origin | None = None

    @property
    def is_retry(self) -> bool:
        """Tell whether its questions are planned in earlier slices too."""
        return self.generation > 0 and not self.added


_BESIDE = {"based_on", "added", "origin"}  # of a slice, what is written beside the slices: an earlier version reads those


@dataclass(frozen=True, slots=True)
class Plan:
    """All generations: their slices in order, and by generation the tables of those that were added."""

    slices: tuple[Slice, ...]
    tables: dict[int, Grown]


@dataclass(frozen=True, slots=True)
class _Added:
    """The new questions of a table that has grown; there may be none, as in a shard."""

    table: Grown
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class _Generation:
    """What `plan/000.json` holds: slices, or those that were added, which an earlier version would take for a retry's."""

    slices: tuple[Slice, ...] | None = None
    added: _Added | None = None
    generation: int = 0
    run_id: str | None = None  # of the version before: not there
    based_on: dict[int, tuple[int, ...]] = field(default_factory=dict)
    origins: dict[int, Origin] = field(default_factory=dict)

    def complete(self) -> Iterator[Slice]:
        """Yield its slices with what is written beside them. Raises ValueError where there are none."""
        slices = self.added.slices if self.added else self.slices
        if slices is None:
            raise ValueError("it has no slices")
        for piece in slices:
            bases, origin = self.based_on.get(piece.part, ()), self.origins.get(piece.part)
            yield replace(piece, based_on=bases, added=self.added is not None, origin=origin)


_GENERATION, _QUESTION = TypeAdapter(_Generation), TypeAdapter(Question)


def write_generation(
    store: Store,
    slices: Iterable[Sequence[Question]],
    *,
    generation: int = 0,
    first_part: int = 1,
    based_on: Sequence[Iterable[int]] = (),
    origins: Sequence[Origin] = (),
    grown: Grown | None = None,
    run_id: str | None = None,
) -> bool:
    """Append a generation to the plan; return False where another process has written that generation.

    `based_on`: of each slice the earlier parts that its questions are planned in; `pack` looks into them.
    `origins`: in a merged run, of each slice the part that it was published as. `grown`: the table whose new questions these
    are.
    The caller says which generation: counted here, a plan that appears a moment earlier would be written twice.
    Raises UserError where it is larger than what is read again.
    """
    directory = f".run/plan/{generation:03d}-{secrets.token_hex(4)}"
    written = []
    for part, questions in zip(count(first_part), slices):
        data = b"".join(json.dumps(asdict(q), ensure_ascii=False).encode() + b"\n" for q in questions)
        key = f"{directory}/{part:06d}.jsonl"
        if len(data) > MAX_SLICE:
            raise UserError(f"part {part} would have {len(data):,} bytes of questions: use a smaller --checkpoint-interval")
        store.put_new(key, data)
        written.append(Slice(part, len(questions), key, hashlib.sha256(data).hexdigest(), generation))
    slices_json = [{name: value for name, value in asdict(s).items() if name not in _BESIDE} for s in written]
    body: dict[str, Any] = {"generation": generation, "run_id": run_id}
    body |= {"slices": slices_json} if grown is None else {"added": {"table": asdict(grown), "slices": slices_json}}
    if based_on:
        body["based_on"] = {piece.part: sorted(parts) for piece, parts in zip(written, based_on)}
    if origins:
        body["origins"] = {piece.part: origin for piece, origin in zip(written, origins)}
    data = json.dumps(body, indent=1).encode()
    if len(data) > MAX_LIST:
        raise UserError(f"a plan of {len(written):,} parts is too long: use a larger --checkpoint-interval")
    if store.put_new(_list_key(generation), data):
        return True
    store.delete_directory(directory)
    return False


def read_slices(store: Store, run_id: str | None = None) -> tuple[Slice, ...]:
    """Return the slices of all generations in order, as `read_plan` does."""
    return read_plan(store, run_id).slices


def read_plan(store: Store, run_id: str | None = None) -> Plan:
    """Return the plan; empty where nothing is planned yet.

    Raises DamagedError where a list is not as `write_generation` writes it, or is of another run.
    """
    slices: list[Slice] = []
    tables: dict[int, Grown] = {}
    for generation in range(len(generations(store))):
        key = _list_key(generation)
        try:
            found = _GENERATION.validate_json(store.get(key, MAX_LIST))
            if found.run_id not in (None, run_id) and run_id is not None:
                raise ValueError("it is of another run")
            pieces = list(found.complete())
            for part, piece in enumerate(pieces, start=len(slices) + 1):
                _check(piece, part, generation)
        except ValueError as error:
            what = faults(error) if isinstance(error, ValidationError) else error
            raise DamagedError(f"{store.address(key)} is damaged, or not this run's plan: {what}") from None
        slices += pieces
        if found.added is not None:
            tables[generation] = found.added.table
    return Plan(tuple(slices), tables)


def _check(piece: Slice, part: int, generation: int) -> None:
    """Raise ValueError where a slice is not the one that has its place in the plan."""
    if (piece.part, piece.generation) != (part, generation) or part >= MAX_PART:
        raise ValueError(f"part {part} of generation {generation} is called {piece.part} of {piece.generation}")
    if not re.fullmatch(rf"\.run/plan/{generation:03d}-[0-9a-f]{{8}}/{part:06d}\.jsonl", piece.key):
        raise ValueError(f"the key of part {part} is none of its own")
    if not 0 <= piece.size <= MAX_SLICE or not re.fullmatch("[0-9a-f]{64}", piece.sha256):
        raise ValueError(f"the size or the digest of part {part} is none")


def read_questions(store: Store, piece: Slice) -> tuple[Question, ...]:
    """Return a slice's questions; a question's sequence is its index here. Raises DamagedError."""
    data = store.get(piece.key, MAX_SLICE)
    address = store.address(piece.key)
    if hashlib.sha256(data).hexdigest() != piece.sha256:
        raise DamagedError(f"{address}: the plan's slice {piece.part} was changed after it was written")
    try:
        questions = tuple(map(_QUESTION.validate_json, data.splitlines()))
    except ValidationError as error:
        raise DamagedError(f"{address}: a line of the plan's slice {piece.part} is no question: {faults(error)}") from None
    if len(questions) != piece.size:
        raise DamagedError(
            f"{address} has {len(questions):,} questions, not the {piece.size:,} of the plan's slice {piece.part}"
        )
    return questions


def generations(store: Store) -> list[str]:
    """Return the names of the plan's generations in order: that of generation k is the k-th. Other files count for nothing."""
    found = {int(match[1]) for name in store.list(".run/plan") if (match := _LISTS.fullmatch(name))}
    names = [f"{generation:03d}.json" for generation in range(len(found))]
    if found != set(range(len(found))):
        missing = next(k for k in range(len(found)) if k not in found)
        raise DamagedError(f"{store.address(_list_key(missing))} is gone: the plan has later generations")
    return names


def _list_key(generation: int) -> str:
    return f".run/plan/{generation:03d}.json"
