"""An experiment: every probe on every kept representation and layer, against the baselines, on one split of the questions."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from storage.answers import is_right
from storage.errors import UserError
from storage.fields import in_order, is_ragged
from storage.probing.baselines import baseline_scores
from storage.probing.finding import Finding, best_on_test, find, too_few
from storage.probing.groups import image_groups
from storage.probing.judge import Breakdown, Judge, Scored, quality
from storage.probing.labels import Labels, read_labels
from storage.probing.probes import ProbeName, fit
from storage.probing.score import Bools, Floats
from storage.probing.split import Rows, Split, SplitName, check_classes, grouped_split, published_split
from storage.reading.load import load, load_frame
from storage.reading.source import OpenPart, Source

_EXACT_MATCH = "exact match with the ground truth, after normalisation"
_MAX_VALUES = 50  # of a column that a breakdown is made by
_OWN = ("question_id", "image_id", "question", "answer", "ground_truth_answer")


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """What the user chose."""

    labels: Path | None = None  # None: the ground truth
    label_column: str | None = None
    keep_mismatches: bool = False
    split: SplitName = "grouped"
    probes: tuple[ProbeName, ...] = ("linear", "mlp")
    by: str | None = None
    seed: int = 0
    draws: int = 2000


@dataclass(frozen=True, slots=True)
class Side:
    """A side of the split."""

    questions: int
    wrong: int
    images: int


@dataclass(frozen=True, slots=True)
class Experiment:
    """What was done, on what, and what came out."""

    directory: str
    settings: ProbeSettings
    labels: Labels
    sides: dict[str, Side]
    baselines: tuple[Scored, ...]
    best_baseline: str  # by the validation side, or by the test side where there is no other
    best_baseline_on_test: str
    finding: Finding
    warnings: tuple[str, ...]
    probes: tuple[Scored, ...]
    breakdown: tuple[Breakdown, ...]  # of the best field of each probe
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Questions:
    """The labelled questions: `rows` are theirs among all that the parts hold."""

    frame: pd.DataFrame
    rows: Rows
    wrong: Bools
    images: list[str]


def run_experiment(directory: Path | str, settings: ProbeSettings, show: Callable[[str], None] = lambda _: None) -> Experiment:
    """Fit and score everything; `show` is called with the name of each field before its probes are fitted.

    Raises UserError where the labels do not fit the run or do not suffice.
    """
    _check_packages()
    frame = load_frame(directory, order="file")
    labels = _labels(frame, settings)
    questions = _labelled(frame, labels)
    check_classes(questions.wrong)
    values = _column(questions.frame, settings.by) if settings.by is not None else None
    split = _split(questions, settings)
    judge = Judge(questions.wrong, questions.images, split, draws=settings.draws, seed=settings.seed)
    baselines = baseline_scores(questions.frame, questions.wrong, split)
    scores: dict[tuple[str, str], Floats] = {}
    probes: list[Scored] = []
    left_out: list[str] = []
    for field in _fields(directory):
        found_of = load(directory, field, order="file", columns=[])
        places = {question: place for place, question in enumerate(found_of.ids)}
        rows = [places[question] for question in questions.frame["question_id"] if question in places]
        if len(rows) < len(questions.frame):  # of images: some questions have none
            left_out.append(field)
            continue
        show(field)
        vectors = found_of.vectors[rows]
        for probe in settings.probes:
            found = scores[field, probe] = fit(probe, vectors, questions.wrong, split, seed=settings.seed)
            probes.append(judge.score(field, probe, found, baselines))
    probes = _choose(probes, split)
    best = [max((p for p in probes if p.probe == name), key=quality) for name in settings.probes]
    judged = tuple(judge.score(name, "baseline", found, {}) for name, found in baselines.items())
    sides = _sides(questions, split)
    return Experiment(
        directory=str(directory),
        settings=settings,
        labels=labels,
        sides=sides,
        baselines=judged,
        best_baseline=max(judged, key=quality).name,
        best_baseline_on_test=best_on_test(judged).name,
        finding=find(probes, judged, validated="validation" in sides),
        warnings=(*too_few(sum(labels.wrong.values()), sides["test"].images), *_left_out(left_out)),
        probes=tuple(probes),
        breakdown=tuple(
            piece for p in best if values is not None for piece in judge.break_down(p, scores[p.name, p.probe], values)
        ),
        environment=_environment(),
    )


def _check_packages() -> None:
    if absent := [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]:
        raise UserError(f"probing needs {' and '.join(absent)}: pip install 'halp-extractor[probe]'")


def _labels(frame: pd.DataFrame, settings: ProbeSettings) -> Labels:
    answers = dict(zip(frame["question_id"], frame["answer"]))
    if settings.labels is not None:
        return read_labels(settings.labels, answers, column=settings.label_column, keep_mismatches=settings.keep_mismatches)
    if settings.label_column is not None or settings.keep_mismatches:
        raise UserError("--label-column and --keep-mismatches are of a label file: add --labels")
    truths = dict(zip(frame["question_id"], frame["ground_truth_answer"]))
    wrong = {name: not is_right(answers[name], truth) for name, truth in truths.items() if truth.strip()}
    if not wrong:
        raise UserError("no question has a ground truth answer: give --labels, a CSV with question_id and true or false")
    return Labels(wrong, _EXACT_MATCH, unlabelled=len(frame) - len(wrong))


def _labelled(frame: pd.DataFrame, labels: Labels) -> _Questions:
    rows = np.flatnonzero(frame["question_id"].isin(labels.wrong.keys()))
    kept = frame.iloc[rows].reset_index(drop=True)
    return _Questions(kept, rows, kept["question_id"].map(labels.wrong).to_numpy(bool), image_groups(kept))


def _column(frame: pd.DataFrame, name: str) -> list[str]:
    if name not in frame:
        carried = [str(column) for column in frame.columns if column not in _OWN]
        raise UserError(f"--by {name}: the questions carry no such column; there are {', '.join(carried)}")
    values = frame[name].astype(str)
    if values.nunique() > _MAX_VALUES:
        raise UserError(f"--by {name}: {values.nunique()} different values are too many for a table ({_MAX_VALUES})")
    found: list[str] = values.tolist()
    return found


def _split(questions: _Questions, settings: ProbeSettings) -> Split:
    if settings.split == "grouped":
        return grouped_split(questions.wrong, questions.images, settings.seed)
    frame = questions.frame
    rows = frame["csv_row"].tolist() if "csv_row" in frame else None
    return published_split(questions.wrong, frame["question_id"].tolist(), rows)


def _fields(directory: Path | str) -> list[str]:
    fields = {field for found in Source(directory).read(OpenPart.fields) for field in found if not is_ragged(field)}
    if not fields:
        raise UserError(f"{directory}: its parts hold no question")
    return sorted(fields, key=in_order)


def _left_out(fields: list[str]) -> list[str]:
    return [f"left out, as some questions have no image: {', '.join(fields)}"] if fields else []


def _choose(probes: list[Scored], split: Split) -> list[Scored]:
    """Mark the best layer of each representation that has layers, if there is a validation side to choose by."""
    if not len(split.validation):
        return probes
    best: dict[tuple[str, str], Scored] = {}
    for scored in (p for p in probes if p.layer is not None):
        place = (scored.representation, scored.probe)
        best[place] = max(best.get(place, scored), scored, key=quality)
    return [replace(scored, chosen=best.get((scored.representation, scored.probe)) is scored) for scored in probes]


def _sides(questions: _Questions, split: Split) -> dict[str, Side]:
    images = np.asarray(questions.images)
    return {
        name: Side(len(rows), int(questions.wrong[rows].sum()), len(np.unique(images[rows])))
        for name, rows in (("train", split.train), ("validation", split.validation), ("test", split.test))
        if len(rows)
    }


def _environment() -> dict[str, str]:
    packages = ("halp-extractor", "scikit-learn", "torch", "numpy")
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
