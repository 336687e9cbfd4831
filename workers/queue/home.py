"""The home of a run: where it was first fed from. A copy of an unfinished run has the same id, and is left alone.

It is noted in the same Redis as the messages. Where the noted place holds the run no longer, it was moved.
"""

from __future__ import annotations

import os
import posixpath
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from storage.errors import DamagedError, UserError
from storage.runs.run import Run
from storage.stores.location import is_within, resolve_location
from workers.settings import settings

_KEPT = 90 * 24 * 3600  # seconds


class CopyError(UserError):
    """A run lies elsewhere too, and is worked on there."""


def claim(client: Any, run: Run) -> bool:
    """Note that a run is fed from where it lies; tell whether it lay elsewhere before. Raises CopyError."""
    key = _key(run)
    if client.set(key, os.fsencode(run.location), nx=True, ex=_KEPT) or _noted(client, run) == run.location:
        return False
    if other := other_home(client, run):
        raise CopyError(
            f"{run.location} is a copy of {other} (both are run {run.run_id}), and that one is worked on: "
            f"move one of them out of the data roots, or delete it"
        )
    client.set(key, os.fsencode(run.location), ex=_KEPT)
    return True


def is_known(client: Any, run: Run) -> bool:
    """Tell whether a run was ever fed through this Redis, as far as that remembers."""
    return _noted(client, run) is not None


def other_home(client: Any, run: Run) -> str | None:
    """Return where a run is worked on, if that is elsewhere and holds it still."""
    noted = _noted(client, run)
    return noted if noted not in {None, run.location} and _holds(noted, run) else None


def _noted(client: Any, run: Run) -> str | None:
    try:
        noted = client.get(_key(run))
    except NoPermissionError:
        raise
    except ResponseError:  # a stranger's key of another type
        return None
    return None if noted is None else os.fsdecode(noted)


def _holds(location: str, run: Run) -> bool:
    """Tell whether a place holds this run: one that we may look at, since whoever can write to Redis can name any."""
    places = (*settings().data_roots, posixpath.dirname(run.location))
    try:
        if resolve_location(location) != location or not any(is_within(location, place) for place in places):
            return False
        return Run.open(location).run_id == run.run_id
    except (UserError, DamagedError, ValueError):
        return False
    except OSError:  # it is there, and cannot be read now
        return True


def _key(run: Run) -> str:
    return f"halp:home:{run.run_id}"
