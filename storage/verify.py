"""Verifying a run: every planned question accounted for exactly once, every vector whole, of the right size and finite."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from storage.naming import group_key
from storage.pack import Sidecar, read_sidecar
from storage.plan import Slice
from storage.run import Run
from storage.settings import ModelFacts

_TEXTS = ("question", "image_id", "answer", "ground_truth_answer")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be."""

    file: str
    question_id: str | None
    problem: str

    def __str__(self) -> str:
        where = f"{self.file}, question {self.question_id}" if self.question_id is not None else self.file
        return f"{where}: {self.problem}"


def verify(run: Run) -> Iterator[Finding]:
    """Yield what is wrong with a run's published parts; nothing where all is well."""
    if not run.slices:
        yield Finding(".run/plan", None, "nothing is planned: enqueue was interrupted, run the same command again")
    published = run.parts_with_sidecar()
    for piece in run.slices:
        path = run.part_path(piece.part)
        if piece.part in published:
            yield from _verify_part(run, piece, path)
        elif path.exists():
            yield Finding(path.name, None, "has no sidecar yet: the collector writes it at its next sweep")
        else:
            yield Finding(path.name, None, f"is not published yet ({piece.size} questions)")
    names = {run.part_name(piece.part) for piece in run.slices}
    for path in sorted(run.output_dir.glob("*.h5")):
        if path.name not in names:
            yield Finding(path.name, None, "is not a part of this run, but readers will take it for one")


def _verify_part(run: Run, piece: Slice, path: Path) -> Iterator[Finding]:
    sidecar = read_sidecar(run, piece.part)
    planned = Counter(question.question_id for question in run.questions(piece.part))
    found = Counter(sidecar.question_ids) + Counter(failure.question_id for failure in sidecar.failures)
    for question_id in planned - found:
        yield Finding(path.name, question_id, "is planned, but neither written nor failed")
    for question_id in found - planned:
        yield Finding(path.name, question_id, "is there once more than it is planned")
    if (damage := _damage(path, sidecar)) is not None:  # then opening it is not safe: HDF5 can hang on a damaged heap
        yield Finding(path.name, None, damage)
        return
    with h5py.File(path, "r") as file:
        if set(file) != {group_key(question_id) for question_id in sidecar.question_ids}:
            yield Finding(path.name, None, "its groups are not the questions that its sidecar lists")
        model = run.model_facts()
        for question_id in sidecar.question_ids:
            if (key := group_key(question_id)) in file:
                for problem in _problems(file[key], model):
                    yield Finding(path.name, question_id, problem)


def _damage(path: Path, sidecar: Sidecar) -> str | None:
    if not path.exists():
        return "was published and is gone"
    if path.stat().st_size != sidecar.size:
        return f"has {path.stat().st_size} bytes; it was published with {sidecar.size}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sidecar.sha256:
            return "its content is not what was published (SHA-256)"
    return None


def _problems(group: h5py.Group, model: ModelFacts | None) -> Iterator[str]:
    for name in _TEXTS:
        if name not in group:
            yield f"{name} is missing"
    if model is None:
        yield "the run has vectors, but no record of the model (.run/model.json)"
        return
    for name, width in model.field_widths().items():
        if name not in group:
            yield f"{name} is missing"
        elif group[name].shape != (width,) or group[name].dtype != np.float32:
            yield f"{name} is {group[name].dtype} {group[name].shape}, not float32 ({width},)"
        elif not np.isfinite(group[name][:]).all():
            yield f"{name} has values that are not finite"
