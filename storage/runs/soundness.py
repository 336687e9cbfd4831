"""Whether an unfinished run still has what it goes by: its plan and its model's record, which nobody can compute again."""

from __future__ import annotations

import hashlib
from itertools import islice

from storage.errors import DamagedError
from storage.runs import plan
from storage.runs.run import Run

_ADVICE = "put it back from a backup, or begin a new run in another --output-dir; parts that are written stay as they are"


def check_private_files(run: Run, limit: int | None = None) -> None:
    """Raise DamagedError where one of the private files is damaged or gone; of the slices look at so many open ones."""
    try:
        run.model_facts()
    except (DamagedError, ValueError) as error:
        raise _damaged(run, ".run/model.json", error) from error
    try:
        slices = plan.read_slices(run.store)
    except (DamagedError, ValueError, TypeError, LookupError) as error:
        raise _damaged(run, ".run/plan", error) from error
    published = run.parts_with_sidecar()
    pieces = list(islice((piece for piece in slices if piece.part not in published), limit))
    contents = run.store.get_many(piece.key for piece in pieces)
    for piece in pieces:
        try:
            data = next(contents)
        except FileNotFoundError:
            raise DamagedError(f"{run.store.address(piece.key)}, a slice of the plan, is gone: {_ADVICE}") from None
        if hashlib.sha256(data).hexdigest() != piece.sha256:
            raise DamagedError(f"{run.store.address(piece.key)}, a slice of the plan, was changed: {_ADVICE}")


def _damaged(run: Run, key: str, error: Exception) -> DamagedError:
    text = str(error).partition("\n")[0]
    where = text if run.location in text else f"{run.store.address(key)} is damaged ({text})"
    return DamagedError(where if _ADVICE in where else f"{where}: {_ADVICE}")
