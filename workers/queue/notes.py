"""Notes on feeding: how far each slice of a run is fed, in the same Redis as the messages; and how long a slice is silent.

Silence is measured by this process's own clock: the server's may be set back by a day.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from storage.runs.plan import Slice

_LOOK_KEPT = 24 * 3600  # seconds

# Of each run that this process feeds: how each fed slice was when last seen to change, and when that was.
_seen: dict[str, dict[int, tuple[Fed, float]]] = {}


@dataclass(frozen=True, slots=True)
class Fed:
    """How far a slice is fed."""

    upto: int = 0  # questions below this sequence were put into the queue
    finished: int = 0  # questions staged when last looked at

    @classmethod
    def decode(cls, data: bytes, size: int) -> Fed | None:
        """Return what was noted of a slice; None where it is nothing of ours."""
        try:
            noted = json.loads(data)
            entry = cls(noted["upto"], noted["finished"])
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        sound = type(entry.upto) is int and type(entry.finished) is int and 0 <= entry.finished <= entry.upto <= size
        return entry if sound else None


class Notes:
    """What is noted of one run. Used under the run's lock alone."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._key, self._look = f"halp:fed:{run_id}", f"halp:look:{run_id}"
        self._seen = _seen.setdefault(run_id, {})

    def read(self, pieces: Mapping[int, Slice]) -> dict[int, Fed]:
        """Return what is noted of some slices, and remove all else. What is not as we write it counts as fed and finished."""
        try:
            found = self._client.hgetall(self._key)
        except NoPermissionError:
            raise
        except ResponseError:  # a stranger's key of another type
            self.clear_progress()
            return {}
        noted: dict[int, Fed] = {}
        for name, data in found.items():
            piece = pieces.get(int(name)) if name.isdigit() else None
            if piece is None:
                self._client.hdel(self._key, name)
            else:
                noted[piece.part] = Fed.decode(data, piece.size) or Fed(piece.size, piece.size)
        for part in self._seen.keys() - noted.keys():
            del self._seen[part]
        if not pieces:  # the run is finished
            _seen.pop(self._run_id, None)
        return noted

    def write(self, part: int, entry: Fed) -> None:
        """Note how far a slice is fed."""
        self._client.hset(self._key, part, json.dumps(asdict(entry)))

    def clear_progress(self) -> None:
        """Forget what was fed, so that it is fed again."""
        self._client.delete(self._key)

    def ask_to_look(self) -> None:
        """Have the next feeder look for lost messages: some were dropped."""
        self._client.set(self._look, 1, ex=_LOOK_KEPT)

    def is_asked_to_look(self) -> bool:
        """Tell whether somebody asked so, once."""
        return bool(self._client.delete(self._look))

    def silence(self, part: int, entry: Fed) -> float:
        """Return for how many seconds a slice has been as it is."""
        now = time.monotonic()
        last, moved = self._seen.get(part, (None, now))
        if last == entry:
            return now - moved
        self._seen[part] = entry, now
        return 0.0

    def break_silence(self, part: int, entry: Fed) -> None:
        """Begin to count a slice's silence again: it was looked at."""
        self._seen[part] = entry, time.monotonic()
