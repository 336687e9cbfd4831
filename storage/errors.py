"""Errors whose message is meant for the person at the command line."""

from __future__ import annotations

# What to do about a damaged part.
ADVICE = "`storage verify` finds what is damaged, `producer enqueue … --repair` computes it again"
_LONGEST = 120  # characters of a name in a message


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


class LayoutError(UserError):
    """A file has a part's name and is none: `what` in it is not as docs/format.md declares it."""

    def __init__(self, file: object, what: str, reason: str) -> None:
        super().__init__(file, what, reason)

    @property
    def problem(self) -> str:
        """What is wrong, without the file's name."""
        _, what, reason = self.args
        return f"is not a part of this layout: {what if len(what) <= _LONGEST else what[:_LONGEST] + '…'} {reason}"

    def __str__(self) -> str:
        return f"{self.args[0]} {self.problem}"


class NotReadError(UserError, OSError):
    """A file was not given by the disk or the network that it lies on: that says nothing of what is in it."""

    def __str__(self) -> str:
        return str(self.args[1])
