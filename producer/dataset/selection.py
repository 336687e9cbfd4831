"""The selection: which of a dataset's questions a run takes, in which order, in which slices."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

from storage.errors import UserError
from storage.question import Question
from storage.screen.terminal import amount

T = TypeVar("T")
_TEST_SIZE = 3


@dataclass(frozen=True, slots=True)
class Shard:
    """One of so many shares of a table.

    A question's share follows from its image alone, or from its id where it has none: it is the same on every machine, and
    stays the same where a table grows.
    """

    number: int  # from 1
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that a text such as `2/8` names. Raises UserError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {text}: give the shard's number, from 1 on, and how many there are, as in 2/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, question: Question) -> bool:
        """Tell whether a question is in this shard."""
        digest = sha256(question.lane_key.encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1


def select(questions: Sequence[Question], *, limit: int | None, test: bool, shard: Shard | None = None) -> list[Question]:
    """Return the first `limit`; with `test` a random three of those, always the same; of these the `shard`'s.

    They are in the CSV's order. Raises UserError where the shard has none of them.
    """
    chosen = list(questions[:limit])
    if test and len(chosen) > _TEST_SIZE:
        chosen = [chosen[i] for i in sorted(random.Random(0).sample(range(len(chosen)), _TEST_SIZE))]
    if shard is None:
        return chosen
    if not (held := [question for question in chosen if shard.holds(question)]):
        raise UserError(
            f"--shard {shard}: none of the {amount(len(chosen), 'question')} is in it, as an image's questions stay together: "
            "use fewer shards, or leave this one out"
        )
    return held


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
