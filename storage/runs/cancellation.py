"""Cancelling a run: a note in a file, which every worker looks for before it begins a question."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass

from storage.stores.store import Store

CANCELLED = ".run/cancelled.json"


@dataclass(frozen=True, slots=True)
class Cancellation:
    """What cancels a run: the file's bytes, and the time in it on the wall clock of whoever wrote it."""

    note: bytes
    at: float | None


class Cancellable:
    """A run, as far as it can be cancelled and go on again."""

    store: Store

    def cancel(self) -> bool:
        """Have nobody begin another question of this run; return False where that is so already.

        Each call leaves a note of its own: a command that takes back an earlier one must see that this one is another.
        """
        note = json.dumps({"at": time.time(), "id": secrets.token_hex(8)}).encode()
        if self.store.put_new(CANCELLED, note):
            return True
        self.store.put(CANCELLED, note)
        return False

    def is_cancelled(self) -> bool:
        """Tell whether the run is cancelled."""
        return self.store.exists(CANCELLED)

    def cancellation(self) -> Cancellation | None:
        """Return what cancels the run; None where nothing does."""
        try:
            note = self.store.get(CANCELLED)
        except FileNotFoundError:
            return None
        try:
            at = json.loads(note)["at"]
        except (ValueError, TypeError, KeyError):  # of an earlier version, which noted no time
            at = None
        return Cancellation(note, at if isinstance(at, float) else None)

    def withdraw_cancellation(self, only: Cancellation | None = None) -> None:
        """Let the run go on; with `only` where that is still what cancels it."""
        if only is None:
            self.store.delete(CANCELLED)
            return
        aside = f"{CANCELLED}.{secrets.token_hex(4)}"
        self.store.move(CANCELLED, aside)  # first, and looked at then: whoever cancels in between is not overwritten
        try:
            note = self.store.get(aside)
        except FileNotFoundError:  # taken back already
            return
        if note != only.note:
            self.store.put_new(CANCELLED, note)
        self.store.delete(aside)
