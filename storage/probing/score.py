"""Scores of a probe, with confidence intervals from a bootstrap over images: the questions of one are no independent draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_LEVEL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Draws of images with replacement, the same for everything that is scored: so differences are paired."""

    def __init__(self, wrong: Bools, images: Sequence[str], *, draws: int, seed: int) -> None:
        self._wrong = wrong
        _, image = np.unique(np.asarray(images), return_inverse=True)
        number = int(image.max()) + 1
        drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
        self._weights: Floats = np.concatenate(
            [np.ones((1, len(wrong))), drawn[:, image]]
        )  # (1 + draws, N); 0: the sample

    def auroc(self, scores: Floats) -> Estimate:
        """Return the area under the ROC curve: how often a wrong answer scores above a right one, ties counted half."""
        return _estimate(self._aurocs(scores))

    def auprc(self, scores: Floats) -> Estimate:
        """Return the average precision; that of a constant is the share of wrong answers."""
        wrong, right = self._masses(scores)
        wrong, right = wrong[:, ::-1], right[:, ::-1]  # the highest score first
        found = np.cumsum(wrong, axis=1)
        with np.errstate(invalid="ignore"):
            precision = np.nan_to_num(found / (found + np.cumsum(right, axis=1)))
            return _estimate((wrong * precision).sum(axis=1) / found[:, -1])

    def f1(self, scores: Floats, threshold: float) -> Estimate:
        """Return F1 of "wrong" where the score reaches the threshold."""
        flagged = scores >= threshold
        hits = self._weights[:, flagged & self._wrong].sum(axis=1)
        total = self._weights[:, flagged].sum(axis=1) + self._weights[:, self._wrong].sum(axis=1)
        with np.errstate(invalid="ignore"):
            return _estimate(2 * hits / total)

    def difference(self, scores: Floats, others: Floats) -> Estimate:
        """Return by how much the AUROC of `scores` is above that of `others`, paired draw by draw."""
        return _estimate(self._aurocs(scores) - self._aurocs(others))

    def _aurocs(self, scores: Floats) -> Floats:
        wrong, right = self._masses(scores)
        below = np.cumsum(right, axis=1) - right
        with np.errstate(invalid="ignore"):
            area: Floats = (wrong * (below + right / 2)).sum(axis=1) / (wrong.sum(axis=1) * right.sum(axis=1))
        return area

    def _masses(self, scores: Floats) -> tuple[Floats, Floats]:
        """Return the weights of wrong and of right answers at each distinct score, ascending: (1 + draws, scores)."""
        order = np.argsort(scores, kind="stable")
        starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
        weights = self._weights[:, order]
        wrong = self._wrong[order]
        return np.add.reduceat(weights * wrong, starts, axis=1), np.add.reduceat(weights * ~wrong, starts, axis=1)


def auroc(wrong: Bools, scores: Floats) -> float:
    """Return the AUROC alone."""
    return Bootstrap(wrong, list(map(str, range(len(wrong)))), draws=0, seed=0).auroc(scores).value


def best_threshold(wrong: Bools, scores: Floats) -> float:
    """Return the score from which on answers are flagged for the best F1."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last of each distinct score
    f1 = 2 * np.cumsum(wrong[order])[ends] / (ends + 1 + wrong.sum())
    return float(scores[order][ends[int(np.argmax(f1))]])


def _estimate(values: Floats) -> Estimate:
    """Return the sample's value with its interval; draws without one of the classes say nothing and are left out."""
    draws = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(draws, _LEVEL) if len(draws) else (np.nan, np.nan)
    return Estimate(float(values[0]), float(low), float(high))
