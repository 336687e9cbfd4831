"""Errors whose message is meant for the person at the command line."""

from __future__ import annotations

# What to do about a damaged part.
ADVICE = "`storage verify` finds what is damaged, `producer enqueue … --repair` computes it again"


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and how to mend it. Exit code 2."""


class ObjectStoreError(UserError, OSError):
    """An object store refused a request or did not answer: for a person to mend, or for a worker to try again."""

    def __str__(self) -> str:
        return str(self.args[0])


class DamagedError(Exception):
    """A stored file does not hold what was written to it."""


class ReplacedError(UserError):
    """Where an open run lay is another one by now, or none: nothing of the open one may be written there."""


class UnfinishedWarning(UserWarning):
    """A run is read of which parts are not published yet."""
