"""The account of a run, from its files alone: N planned = N written + N failed + N staged + N outstanding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from storage.pack import Sidecar, read_sidecar
from storage.run import Run


@dataclass(frozen=True, slots=True)
class Account:
    """How far a run is. Every planned question is in exactly one of written, failed, staged and outstanding."""

    planned: int = 0
    written: int = 0  # in a published part, with vectors
    failed: int = 0  # in a published part, with a reason
    staged: int = 0  # finished, waiting for the rest of its slice
    outstanding: int = 0
    parts_planned: int = 0
    parts_published: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # of the published failures, most frequent first

    @property
    def finished(self) -> bool:
        """Tell whether every part is published."""
        return self.parts_planned > 0 and self.parts_published == self.parts_planned


class Bookkeeper:
    """Takes a run's account again and again; reads each published part's sidecar once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._published: dict[int, tuple[int, Counter[str]]] = {}

    def account(self) -> Account:
        """Return the account as the files show it now."""
        for part in self._run.parts_with_sidecar() - self._published.keys():
            sidecar = read_sidecar(self._run, part)
            self._published[part] = len(sidecar.question_ids), Counter(f.reason for f in sidecar.failures)
        slices = self._run.slices
        planned = sum(s.size for s in slices)
        written = sum(number for number, _ in self._published.values())
        reasons = sum((r for _, r in self._published.values()), Counter[str]())
        open_parts = [s.part for s in slices if s.part not in self._published]
        waiting = {self._run.label(part): part for part in open_parts}
        staged = sum(len(self._run.staged(waiting[d])) for d in self._run.staging_directories() if d in waiting)
        return Account(
            planned=planned,
            written=written,
            failed=reasons.total(),
            staged=staged,
            outstanding=planned - written - reasons.total() - staged,
            parts_planned=len(slices),
            parts_published=len(slices) - len(open_parts),
            reasons=dict(reasons.most_common()),
        )


def sidecars(run: Run) -> list[Sidecar]:
    """Return the sidecars of the published parts, in the order of the plan."""
    return [read_sidecar(run, part) for part in sorted(run.parts_with_sidecar())]
