"""Errors whose message is meant for the person at the command line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and how to mend it. Exit code 2."""


class DamagedError(Exception):
    """A stored file does not hold what was written to it."""


class UnfinishedWarning(UserWarning):
    """A run is read of which parts are not published yet."""
