"""Faults: the faulty lines of a user's file, counted, and the first of them listed in one message."""

from __future__ import annotations

_MAX_LISTED = 20
_MAX_SHOWN = 60  # characters of a quoted text


class Faults:
    """Faulty lines: how many, and the text of the first twenty."""

    def __init__(self) -> None:
        self.number = 0
        self._listed: list[str] = []

    def add(self, text: str) -> None:
        """Count a fault, and keep its text while there is room."""
        self.number += 1
        if self.number <= _MAX_LISTED:
            self._listed.append(f"  {text}")

    def __str__(self) -> str:
        more = self.number - _MAX_LISTED
        return "\n".join(self._listed) + (f"\n  … and {more:,} more" if more > 0 else "")


def short(text: str) -> str:
    """Return a text in quotes, control characters escaped, cut to a length that suits a message."""
    return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}…"
