"""The judge: how well scores tell wrong answers from right ones on the test side, with intervals, and against baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from storage.fields import split_layer
from storage.probing.score import Bools, Bootstrap, Estimate, Floats, auroc, best_threshold
from storage.probing.split import Split

_EVEN = 0.5  # the threshold of F1 where there is no validation side to choose it by
_MIN_OF_EACH = 5  # wrong and right answers of a value, for an AUROC of its own


@dataclass(frozen=True, slots=True)
class Scored:
    """How well one probe on one field, or one baseline, tells wrong answers."""

    name: str  # a HALP field, or the baseline's name
    probe: str  # `linear`, `mlp` or `baseline`
    validation_auroc: float | None  # None where the split has no validation side
    threshold: float  # from which on F1 counts an answer as called wrong
    auroc: Estimate
    auprc: Estimate
    f1: Estimate
    above: dict[str, Estimate]  # of a probe: by how much its AUROC is above each baseline's, paired
    chosen: bool = False  # its layer, of those of its representation and probe, by the validation side

    @property
    def representation(self) -> str:
        """The field without its layer."""
        return split_layer(self.name)[0]

    @property
    def layer(self) -> int | None:
        """The layer, if the field has one."""
        return split_layer(self.name)[1]


@dataclass(frozen=True, slots=True)
class Breakdown:
    """One probe on the test questions that have one value in a column."""

    value: str
    field: str
    probe: str
    questions: int
    wrong: int
    auroc: Estimate | None  # None where one of the classes has too few


class Judge:
    """Scores everything on the same test questions and the same draws."""

    def __init__(self, wrong: Bools, images: Sequence[str], split: Split, *, draws: int, seed: int) -> None:
        self._wrong, self._split, self._draws, self._seed = wrong, split, draws, seed
        self._images = np.asarray(images)
        self._bootstrap = self._bootstrap_of(split.test)

    def score(self, name: str, probe: str, scores: Floats, baselines: Mapping[str, Floats]) -> Scored:
        """Score one set of probabilities [N] of all questions."""
        test, validation = self._split.test, self._split.validation
        threshold, quality = _EVEN, None
        if len(validation):
            threshold = best_threshold(self._wrong[validation], scores[validation])
            quality = auroc(self._wrong[validation], scores[validation])
        return Scored(
            name=name,
            probe=probe,
            validation_auroc=quality,
            threshold=threshold,
            auroc=self._bootstrap.auroc(scores[test]),
            auprc=self._bootstrap.auprc(scores[test]),
            f1=self._bootstrap.f1(scores[test], threshold),
            above={other: self._bootstrap.difference(scores[test], values[test]) for other, values in baselines.items()},
        )

    def break_down(self, scored: Scored, scores: Floats, values: Sequence[str]) -> Iterator[Breakdown]:
        """Score the test questions of each value of a column, the most frequent first."""
        column = np.asarray(values)
        names, numbers = np.unique(column[self._split.test], return_counts=True)
        for name in names[np.argsort(-numbers, kind="stable")].tolist():
            rows = self._split.test[column[self._split.test] == name]
            wrong = int(self._wrong[rows].sum())
            enough = min(wrong, len(rows) - wrong) >= _MIN_OF_EACH
            estimate = self._bootstrap_of(rows).auroc(scores[rows]) if enough else None
            yield Breakdown(name, scored.name, scored.probe, len(rows), wrong, estimate)

    def _bootstrap_of(self, rows: np.ndarray) -> Bootstrap:
        return Bootstrap(self._wrong[rows], self._images[rows].tolist(), draws=self._draws, seed=self._seed)


def quality(scored: Scored) -> float:
    """Return what a choice goes by: AUROC on the validation side, or on the test side where there is no other."""
    return scored.auroc.value if scored.validation_auroc is None else scored.validation_auroc
