"""A few of many, taken evenly: what is looked at where all would be too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(items: Sequence[T], number: int) -> list[T]:
    """Return at most `number` items, evenly from the first on."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]
