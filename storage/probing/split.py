"""Splits of questions: by image content, so that no image is on two sides, or as the published probes were split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from storage.errors import UserError
from storage.naming import group_key

SplitName = Literal["grouped", "published"]
Rows = npt.NDArray[np.intp]
MIN_OF_EACH = 20  # wrong and right answers: with fewer, an interval is as wide as the scale

# What the published scripts did: https://github.com/alliedbrother/HALP_EACL
_PUBLISHED_PART = 1000
_PUBLISHED_TEST = 0.2
_PUBLISHED_SEED = 42


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to train on, to choose by, and to report on. The published split has none to choose by."""

    train: Rows
    validation: Rows
    test: Rows


def grouped_split(wrong: npt.NDArray[np.bool_], images: Sequence[str], seed: int) -> Split:
    """Return 60% of the questions to train on, 20% to choose by, 20% to report on; an image's questions stay together.

    Each side gets about the same share of wrong answers. Raises UserError where a side would lack a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=seed)
    try:
        pieces = [rows for _, rows in folds.split(np.zeros(len(wrong)), wrong, np.asarray(images))]
    except ValueError as error:
        groups = f"images, and those that questions about several join, make {len(set(images)):,} groups"
        raise UserError(f"these questions cannot be split by image ({groups}): {error}") from error
    return _checked(Split(np.sort(np.concatenate(pieces[2:])), pieces[1], pieces[0]), wrong)


def published_split(wrong: npt.NDArray[np.bool_], ids: Sequence[str], csv_rows: Sequence[int] | None) -> Split:
    """Return 80% to train on and 20% to report on as the published scripts drew them, whatever the run's order was.

    They read parts of 1000 questions in the CSV's order, the keys of a part sorted, and split with scikit-learn's
    `train_test_split`, stratified, seed 42. An image may be on both sides. `csv_rows` None: the questions are in that
    order already, since the published scripts wrote the parts.
    """
    from sklearn.model_selection import train_test_split

    order = published_order(ids, csv_rows) if csv_rows is not None else np.arange(len(ids))
    train, test = train_test_split(order, test_size=_PUBLISHED_TEST, random_state=_PUBLISHED_SEED, stratify=wrong[order])
    return _checked(Split(train, np.empty(0, np.intp), test), wrong)


def published_order(ids: Sequence[str], csv_rows: Sequence[int]) -> Rows:
    """Return the rows in the order in which the published scripts met the questions."""
    keys = [((row - 1) // _PUBLISHED_PART, group_key(name).encode()) for name, row in zip(ids, csv_rows)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.intp)


def check_classes(wrong: npt.NDArray[np.bool_]) -> None:
    """Raise UserError where there is nothing to tell apart, or too little to say how well it is told apart."""
    errors, right = int(wrong.sum()), int((~wrong).sum())
    if not errors or not right:
        state = "right" if not errors else "wrong"
        raise UserError(f"all {len(wrong)} answers are {state}: there is nothing to predict. Are these the right labels?")
    if min(errors, right) < MIN_OF_EACH:
        raise UserError(
            f"{errors} wrong and {right} right answers are too few: at least {MIN_OF_EACH} of each are needed, "
            "and 200 for intervals worth having. Run more questions"
        )


def _checked(split: Split, wrong: npt.NDArray[np.bool_]) -> Split:
    for name, rows in (("train", split.train), ("validation", split.validation), ("test", split.test)):
        if len(rows) and len(set(wrong[rows].tolist())) < 2:
            raise UserError(f"the {name} side of the split has answers of one class only: too few images. Run more questions")
    return split
