"""Keys in Redis that have a name of ours and hold something of another type: a stranger's, or another program's.

They are named in the log and by `producer status`, left as they are, and gone around.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

logger = logging.getLogger(__name__)
_LOOK = 30.0  # seconds until such a key is tried again
_REPEAT = 600.0  # seconds between two lines about one key
UNACKED, UNACKED_INDEX = "unacked", "unacked_index"


def is_wrong_type(error: object) -> bool:
    """Tell whether Redis refused a command since its key holds something of another type."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


class ForeignKeys:
    """The foreign keys that one connection has met lately."""

    def __init__(self) -> None:
        self._met: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._met

    def __bool__(self) -> bool:
        return bool(self._met)

    def meet(self, name: str, client: Any) -> None:
        """Note a foreign key, and name it in the log."""
        now = time.monotonic()
        self._met[name] = now
        if now - self._said.get(name, float("-inf")) > _REPEAT:
            self._said[name] = now
            logger.error("%s", sentence(name, type_of(client, name)))

    def forget_old(self) -> bool:
        """Forget the keys that are to be tried again; tell whether there were any."""
        now = time.monotonic()
        old = [name for name, met in self._met.items() if now - met > _LOOK]
        for name in old:
            del self._met[name]
        return bool(old)


def foreign_lists(client: Any, names: Iterable[str]) -> list[str]:
    """Return those of some lists that are none. One round trip."""
    names = list(names)
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.llen(name)
        answers = pipe.execute(raise_on_error=False)
    return [name for name, answer in zip(names, answers) if is_wrong_type(answer)]


def foreign_notes(client: Any) -> list[str]:
    """Return those of the keys that kombu notes taken messages in that hold something else."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hget(UNACKED, "-")
        pipe.zrange(UNACKED_INDEX, 0, 0)
        answers = pipe.execute(raise_on_error=False)
    return [name for name, answer in zip((UNACKED, UNACKED_INDEX), answers) if is_wrong_type(answer)]


def foreign_keys(client: Any, lists: Iterable[str]) -> dict[str, str]:
    """Return the foreign keys that a run meets, with their types; `lists` are its queues."""
    return {name: type_of(client, name) for name in (*foreign_lists(client, lists), *foreign_notes(client))}


def sentence(name: str, kind: str) -> str:
    """Return what is to be said of a foreign key."""
    return f"The key {name} in Redis holds a {kind}, which is not ours (WRONGTYPE). It is left alone: delete or rename it."


def type_of(client: Any, name: str) -> str:
    """Return the type of what a key holds."""
    try:
        found = client.type(name)
    except NoPermissionError:  # of a user that was made before this was asked
        return "value of another type"
    return found.decode() if isinstance(found, bytes) else str(found)


def is_strange_lock(client: Any, lock: str, seconds: float) -> bool:
    """Tell whether a lock that is held is none of ours, which all end after some seconds."""
    try:
        left = client.pttl(lock)  # -1 for one that never ends
    except NoPermissionError:
        return False
    return bool(left == -1 or left > 1000 * seconds)
