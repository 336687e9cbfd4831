"""The selection: which of a dataset's questions a run takes, in which order, in which slices."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from storage.question import Question

T = TypeVar("T")
_TEST_SIZE = 3


def select(questions: Sequence[Question], *, limit: int | None, test: bool) -> list[Question]:
    """Return the first `limit`; with `test` a random three of those, always the same, in the CSV's order."""
    chosen = list(questions[:limit])
    if test and len(chosen) > _TEST_SIZE:
        chosen = [chosen[i] for i in sorted(random.Random(0).sample(range(len(chosen)), _TEST_SIZE))]
    return chosen


def order_by_image(questions: Sequence[Question]) -> list[Question]:
    """Return the questions of each image together: images by first appearance, their questions in the given order."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image_id, []).append(question)
    return [question for group in groups.values() for question in group]


def cut(questions: Sequence[T], size: int) -> Iterator[list[T]]:
    """Yield consecutive slices of `size` questions; the last may be shorter. Raises ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"a slice has at least one question, not {size}")
    for start in range(0, len(questions), size):
        yield list(questions[start : start + size])
