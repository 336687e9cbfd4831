"""Waiting messages: which questions of a run the broker still has, in a lane, to be retried, or with a worker.

It tells a question that waits from one whose message is lost. Looking costs a read of the lanes in question, so it is done only
for what has been silent for long.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from storage.runs.run import Run
from workers.queue.queues import ModelQueues

_PAGE = 500  # messages in one round trip
_UNACKED, _INDEX = "unacked", "unacked_index"  # where kombu keeps what a worker has taken
_AHEAD = 60.0  # seconds that the clocks of two machines may differ


def waiting(
    client: Any, run: Run, queues: ModelQueues, missing: dict[int, set[int]], goes_on: Callable[[], bool]
) -> set[tuple[int, int]] | None:
    """Return those of some questions (part to sequences) that have a message; None where `goes_on` says to stop.

    The lanes come first: what is taken from one meanwhile is found with its worker.
    """
    lanes = {queues.lane(run.run_id, run.questions(part)[s].lane_key) for part, wanted in missing.items() for s in wanted}
    labels = {run.label(part): part for part in missing}
    # The task's id, in JSON or in JSON's JSON. Its end, of the feeding, is missing where an older version fed.
    pattern = re.compile(rf'"{re.escape(run.run_id)}-(\d+)-(\d+)(?:-[0-9a-f]{{6}})?\\?"'.encode())
    found = set()
    for page in _pages(client, [*sorted(lanes), queues.retry]):
        if not goes_on():
            return None
        for raw in page:
            match = pattern.search(raw)
            if match is None or (part := labels.get(match[1].decode())) is None:
                continue
            if (sequence := int(match[2])) in missing[part] and _location(raw) == run.location:
                found.add((part, sequence))
    return found


def _pages(client: Any, queues: list[str]) -> Iterator[list[bytes]]:
    for queue in queues:
        # From the end that grows: what is taken at the other shifts nothing.
        start = 0
        while page := _read(lambda: client.lrange(queue, start, start + _PAGE - 1)):  # noqa: B023  (called at once)
            yield page
            start += len(page)
    # By a worker's clock that was ahead, a dead one's would come back only when that time has come.
    known = set(_read(lambda: client.zrangebyscore(_INDEX, "-inf", time.time() + _AHEAD)))
    cursor, first = 0, True
    while first or cursor:
        cursor, entries = _read(lambda: client.hscan(_UNACKED, cursor, count=_PAGE)) or (0, {})  # noqa: B023
        first = False
        yield [raw for tag, raw in entries.items() if tag in known]


def _read(ask: Callable[[], Any]) -> Any:
    """Return what a command returns; nothing where a stranger's key of another type has that name."""
    try:
        return ask()
    except NoPermissionError:
        raise
    except ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
        return []


def _location(raw: bytes) -> str | None:
    """Return where a message looks for its run: before it was moved, that was elsewhere."""
    try:
        message = json.loads(raw)
        body = (message[0] if isinstance(message, list) else message)["body"]
        location: str | None = json.loads(base64.b64decode(body))[1]["run_dir"]
    except (ValueError, TypeError, LookupError, RecursionError):  # nothing of ours
        return None
    return location
