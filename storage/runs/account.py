"""The account of a run, from its files alone: N planned = N written + N failed + N staged + N outstanding.

It is by question id: of a question that was planned again after a failure its last part counts, and `written` wins.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from storage.runs.pack import Sidecar, read_sidecar
from storage.runs.plan import Slice
from storage.runs.run import Run


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
    reasons: dict[str, int] = field(default_factory=dict)  # of the failed, most frequent first

    @property
    def finished(self) -> bool:
        """Tell whether every part is published."""
        return self.parts_planned > 0 and self.parts_published == self.parts_planned


@dataclass(frozen=True, slots=True)
class _Published:
    """A published part in a few numbers, the retried questions left out."""

    written: int
    reasons: Counter[str]  # of the failed
    size: int


class Bookkeeper:
    """Takes a run's account again and again; reads each published part's sidecar once for each generation of the plan.

    It keeps a few numbers of each part, and the ids of the retried questions alone.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._forget()

    def _forget(self) -> None:
        self._slices = self._run.slices
        self._published: dict[int, _Published] = {}
        self._healed: set[str] = set()  # retried questions that a published part has with vectors
        self._retried_reasons: dict[str, str] = {}  # retried questions that failed in their last part
        self._open_retried: dict[int, dict[int, str]] = {}  # of an open part the retried questions: sequence to id

    def account(self) -> Account:
        """Return the account as the files show it now."""
        self._run.refresh()
        described = self._run.parts_with_sidecar()
        if self._run.slices is not self._slices or self._published.keys() - described:  # a repair takes sidecars away
            self._forget()
        for part in described - self._published.keys():
            self._published[part] = self._take(read_sidecar(self._run, part))
        slices = self._run.slices
        planned = sum(piece.size for piece in slices if not piece.is_retry)
        written = sum(part.written for part in self._published.values()) + len(self._healed)
        reasons = sum((part.reasons for part in self._published.values()), Counter[str]())
        reasons += Counter(reason for i, reason in self._retried_reasons.items() if i not in self._healed)
        open_pieces = [piece for piece in slices if piece.part not in self._published]
        waiting = {self._run.label(piece.part): piece for piece in open_pieces}
        staged = sum(self._staged(waiting[d]) for d in self._run.staging_directories() if d in waiting)
        return Account(
            planned=planned,
            written=written,
            failed=reasons.total(),
            staged=staged,
            outstanding=planned - written - reasons.total() - staged,
            parts_planned=len(slices),
            parts_published=len(slices) - len(open_pieces),
            reasons=dict(reasons.most_common()),
        )

    def _take(self, sidecar: Sidecar) -> _Published:
        retried = self._run.retried
        healed = [question_id for question_id in sidecar.question_ids if question_id in retried]
        self._healed.update(healed)
        reasons: Counter[str] = Counter()
        for failure in sidecar.failures:
            if failure.question_id not in retried:
                reasons[failure.reason] += 1
            elif retried[failure.question_id] == sidecar.part:
                self._retried_reasons[failure.question_id] = failure.reason
        return _Published(len(sidecar.question_ids) - len(healed), reasons, sidecar.size)

    def lost_parts(self) -> list[str]:
        """Return a sentence on each part of the last account that is gone or has another size than it was published with.

        By one listing, so what keeps the size is left to `storage verify`. Raises OSError.
        """
        sizes, lost = self._run.store.sizes(), []
        for number, part in sorted(self._published.items()):
            name = self._run.part_name(number)
            size = sizes.get(name)
            if size is None:  # an NFS client may list a directory as it was a minute ago
                with suppress(FileNotFoundError):
                    size = self._run.store.size(name)
            if size is None:
                lost.append(f"{name} was published and is gone")
            elif size != part.size:
                lost.append(f"{name} has {size:,} bytes; it was published with {part.size:,}")
        return lost

    def _staged(self, piece: Slice) -> int:
        staged = self._run.staged(piece.part)
        retried = self._run.retried
        if not retried:
            return len(staged)
        if piece.part not in self._open_retried:
            questions = enumerate(self._run.questions(piece.part))
            self._open_retried[piece.part] = {s: q.question_id for s, q in questions if q.question_id in retried}
        elsewhere = {
            sequence
            for sequence, question_id in self._open_retried[piece.part].items()
            if retried[question_id] != piece.part or question_id in self._healed
        }
        return len(staged.keys() - elsewhere)
