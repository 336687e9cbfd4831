"""When a part's questions were computed, and how long the engine took: two attributes of the part, and none of a question."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from storage.hdf5.layout import Part
from storage.sample import COMPUTED_AT, ENGINE_SECONDS


class Timing:
    """Takes the times out of the facts of a part's questions, while they pass by."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._seconds = 0.0
        self._whole = True  # what an earlier version has staged has no times

    def take(self, key: str, facts: dict[str, Any]) -> None:
        """Take one question's, which are then no longer among its facts."""
        at, seconds = facts.pop(COMPUTED_AT, None), facts.pop(ENGINE_SECONDS, None)
        self._times[key] = np.nan if at is None else float(at)
        self._seconds += seconds or 0.0
        self._whole = self._whole and seconds is not None

    def attributes(self) -> dict[str, Any]:
        """Return what the part says of them: its questions' times in the order of their keys, and the sum of the seconds."""
        times = np.array([self._times[key] for key in sorted(self._times)], np.float64)
        found: dict[str, Any] = {} if np.isnan(times).all() else {COMPUTED_AT: times}
        return found | ({ENGINE_SECONDS: round(self._seconds, 3)} if self._whole and self._times else {})


def computed_at(part: Part) -> npt.NDArray[np.float64] | None:
    """Return when each question of an open part was computed, in the order of its keys; NaN where that is unknown.

    None where the part does not say: it was written by an earlier version. Raises LayoutError.
    """
    times = part.attribute(COMPUTED_AT)
    if times is None:
        return None
    if np.shape(times) != (len(part.keys),) or times.dtype.kind != "f":
        raise part.refusal(f"/@{COMPUTED_AT}", "has not one time for each question")
    return times.astype(np.float64)  # type: ignore[no-any-return]


def engine_seconds(part: Part) -> float | None:
    """Return how long the engine took for an open part's questions; None where the part does not say."""
    seconds = part.attribute(ENGINE_SECONDS)
    return float(seconds) if isinstance(seconds, np.floating) and np.isfinite(seconds) and seconds >= 0 else None
