"""Scores of a probe, with confidence intervals from a bootstrap over images: the questions of one are no independent draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_LEVEL = (2.5, 97.5)
_AT_ONCE = 1 << 22  # weights in memory: 32 MB


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
        _, self._image = np.unique(np.asarray(images), return_inverse=True)
        number = int(self._image.max()) + 1
        drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
        self._times = np.concatenate([np.ones((1, number), drawn.dtype), drawn])  # (1 + draws, images); 0: the sample

    def auroc(self, scores: Floats) -> Estimate:
        """Return the area under the ROC curve: how often a wrong answer scores above a right one, ties counted half."""
        return _estimate(self._each(_Ranked.of(self._wrong, scores), _auroc))

    def auprc(self, scores: Floats) -> Estimate:
        """Return the average precision; that of a constant is the share of wrong answers."""
        return _estimate(self._each(_Ranked.of(self._wrong, scores), _auprc))

    def f1(self, scores: Floats, threshold: float) -> Estimate:
        """Return F1 of "wrong" where the score reaches the threshold."""
        flagged = (scores >= threshold).astype(np.float64)
        if not flagged.any():
            return Estimate(0.0, 0.0, 0.0)
        return _estimate(self._each(_Ranked.of(self._wrong, flagged), _f1))

    def difference(self, scores: Floats, others: Floats) -> Estimate:
        """Return by how much the AUROC of `scores` is above that of `others`, paired draw by draw."""
        return _estimate(
            self._each(_Ranked.of(self._wrong, scores), _auroc) - self._each(_Ranked.of(self._wrong, others), _auroc)
        )

    def _each(self, ranked: _Ranked, measure: Callable[[Floats, Floats], Floats]) -> Floats:
        """Measure the sample and every draw, some draws at a time: their weights are a number per draw and question."""
        rows = max(1, _AT_ONCE // len(self._wrong))
        with np.errstate(invalid="ignore"):  # a draw without one of the classes gives NaN
            pieces = [
                measure(*ranked.masses(self._times[start : start + rows][:, self._image].astype(np.float64)))
                for start in range(0, len(self._times), rows)
            ]
        return np.concatenate(pieces)


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Questions by ascending score, and where each distinct score begins."""

    order: npt.NDArray[np.intp]
    starts: npt.NDArray[np.intp]
    wrong: Bools  # in that order

    @classmethod
    def of(cls, wrong: Bools, scores: Floats) -> _Ranked:
        order = np.argsort(scores, kind="stable")
        return cls(order, np.flatnonzero(np.diff(scores[order], prepend=-np.inf)), wrong[order])

    def masses(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return the weight of wrong and of right answers at each distinct score: (draws, scores) each."""
        weights = weights[:, self.order]
        return (
            np.add.reduceat(weights * self.wrong, self.starts, axis=1),
            np.add.reduceat(weights * ~self.wrong, self.starts, axis=1),
        )


def _auroc(wrong: Floats, right: Floats) -> Floats:
    below = np.cumsum(right, axis=1) - right
    area: Floats = (wrong * (below + right / 2)).sum(axis=1) / (wrong.sum(axis=1) * right.sum(axis=1))
    return area


def _auprc(wrong: Floats, right: Floats) -> Floats:
    wrong, right = wrong[:, ::-1], right[:, ::-1]  # the highest score first
    found = np.cumsum(wrong, axis=1)
    precision = np.nan_to_num(found / (found + np.cumsum(right, axis=1)))
    area: Floats = (wrong * precision).sum(axis=1) / found[:, -1]
    return area


def _f1(wrong: Floats, right: Floats) -> Floats:
    """Return F1 of scores that are 0 and 1, or 1 alone: those of the last distinct score were flagged."""
    hits, alarms = wrong[:, -1], right[:, -1]
    measure: Floats = 2 * hits / (hits + alarms + wrong.sum(axis=1))
    return measure


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
