"""Who may not touch a run: workers and collectors that keep to data roots which it does not lie in, and what mends it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from storage.runs.run import Run

if TYPE_CHECKING:
    from workers.monitor.presence import Presence

_NAMED = 5  # of those with the same roots


def kept_out(run: Run, everybody: Sequence[Presence]) -> Iterator[str]:
    """Yield a sentence on each group of workers that serve a run's model and may not touch it, and on its collectors.

    That some collectors keep to other places is no fault while one of them packs this run.
    """
    from workers.queue.feed import queues_of

    prefix = queues_of(run).prefix
    serving = [p for p in everybody if p.serves_queues(prefix) and not p.may_touch(run.location)]
    for roots, names in _by_roots(serving):
        does = f"{names} may not touch this run, though of its model"
        yield f"{does}: {_outside(run, roots)}; add it: --data-root {shlex.quote(run.location)}, or in HALP_DATA_ROOTS"
    collecting = [p for p in everybody if p.collects]
    if any(p.may_touch(run.location) for p in collecting):
        return
    for roots, names in _by_roots([p for p in collecting if p not in serving]):
        does = f"{names} may not pack this run"
        yield f"{does}: {_outside(run, roots)}; add it: `workers collect … {shlex.quote(run.location)}`, or in HALP_DATA_ROOTS"


def _by_roots(processes: Iterable[Presence]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the names of the processes that have the same data roots."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for process in processes:
        groups.setdefault(process.data_roots or (), []).append(process.name)
    for roots, names in groups.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield roots, ", ".join(names[:_NAMED]) + more


def _outside(run: Run, roots: Sequence[str]) -> str:
    return f"{run.location} lies outside the data roots ({', '.join(roots)})"
