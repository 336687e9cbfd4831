"""The plan: generations of ordered questions, cut into slices. Slice k is part k.

Generation 0 is the dataset; each later one plans questions again that have failed, in parts of their own: a part is never
changed. `plan/000.json` lists the slices of generation 0 with the digest of each; it appears in one step, after its slice
files, so a generation is whole or absent. A slice file has one JSON object a line, a question each.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from storage.errors import DamagedError
from storage.store import Store


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the dataset."""

    question_id: str
    image_id: str  # path of the image relative to the images directory, as in the CSV
    question: str
    ground_truth_answer: str
    csv_row: int  # number of the data row in the CSV, from 1
    extra: dict[str, str]  # the CSV's other columns


@dataclass(frozen=True, slots=True)
class Slice:
    """A fixed run of questions that becomes one part."""

    part: int
    size: int
    key: str
    sha256: str
    generation: int = 0
    based_on: tuple[int, ...] = ()  # earlier parts that its questions are planned in too, and have failed in


def write_generation(
    store: Store,
    slices: Iterable[Sequence[Question]],
    *,
    generation: int = 0,
    first_part: int = 1,
    based_on: Sequence[Iterable[int]] = (),
) -> bool:
    """Append a generation to the plan; return False where another process has written that generation.

    `based_on`: of each slice the earlier parts that its questions are planned in; `pack` looks into them.
    The caller says which generation: counted here, a plan that appears a moment earlier would be written twice.
    """
    directory = f".run/plan/{generation:03d}-{secrets.token_hex(4)}"
    written = []
    for part, questions in zip(count(first_part), slices):
        data = b"".join(json.dumps(asdict(q), ensure_ascii=False).encode() + b"\n" for q in questions)
        key = f"{directory}/{part:06d}.jsonl"
        store.put_new(key, data)
        written.append(Slice(part, len(questions), key, hashlib.sha256(data).hexdigest(), generation))
    bases = {piece.part: sorted(parts) for piece, parts in zip(written, based_on)}
    slices_json = [{name: value for name, value in asdict(s).items() if name != "based_on"} for s in written]
    body = {"generation": generation, "slices": slices_json, **({"based_on": bases} if bases else {})}
    if store.put_new(f".run/plan/{generation:03d}.json", json.dumps(body, indent=1).encode()):
        return True
    store.delete_directory(directory)
    return False


def read_slices(store: Store) -> tuple[Slice, ...]:
    """Return the slices of all generations in order; empty where nothing is planned yet."""
    return tuple(piece for name in generations(store) for piece in _slices(json.loads(store.get(f".run/plan/{name}"))))


def _slices(body: dict[str, Any]) -> Iterator[Slice]:
    bases = body.get("based_on", {})  # beside the slices: an earlier version reads those
    for piece in body["slices"]:
        yield Slice(**piece, based_on=tuple(bases.get(str(piece["part"]), ())))


def read_questions(store: Store, piece: Slice) -> tuple[Question, ...]:
    """Return a slice's questions; a question's sequence is its index here."""
    data = store.get(piece.key)
    if hashlib.sha256(data).hexdigest() != piece.sha256:
        raise DamagedError(
            f"{store.address(piece.key)}: the plan's slice {piece.part} was changed after it was written"
        )
    return tuple(Question(**json.loads(line)) for line in data.splitlines())


def generations(store: Store) -> list[str]:
    """Return the names of the plan's generations in order: that of generation k is the k-th."""
    return [name for name in store.list(".run/plan") if name.endswith(".json")]
