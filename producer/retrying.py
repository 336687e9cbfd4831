"""Retrying: a new generation of the plan, of exactly the questions that have failed by a run's latest state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from producer.dataset.faults import short
from producer.dataset.selection import cut
from storage.errors import UserError
from storage.runs.failures import Failed, published_failures, staged_failures
from storage.runs.plan import write_generation
from storage.runs.run import Run

_MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class Retry:
    """What a retry has planned, and how many failures it could not take because their slices are not packed yet."""

    questions: int
    parts: tuple[int, ...]
    generation: int
    staged: int


def plan_retry(run: Run, reasons: Sequence[str] = (), ids: Sequence[str] = ()) -> Retry:
    """Plan the failed questions again, or those of some reasons or ids, in parts of their own. Settings stay as they are.

    Raises UserError where there is nothing to retry, and where another retry was planned at the same moment.
    """
    run.refresh()
    if members := run.settings.merged:
        places = ", ".join(member.location for member in members)
        raise UserError(f"{run.location} is merged of other runs: retry in those ({places}), then merge them again")
    if run.is_cancelled():
        raise UserError(f"{run.location} is cancelled: resume it first, by the command that it was begun with")
    failures = list(published_failures(run))
    staged = sum(_wanted(failed, reasons, ids) for failed in staged_failures(run))
    _refuse_unknown(run, failures, reasons, ids, staged)
    chosen = [failed for failed in failures if _wanted(failed, reasons, ids)]
    pieces = list(cut(chosen, run.settings.checkpoint_interval))
    slices = [[failed.question for failed in piece] for piece in pieces]
    generation = run.next_generation
    first = 1 + max(piece.part for piece in run.slices)
    _refuse_overflow(run, first + len(slices) - 1)
    based_on = [_parts_of(run, piece) for piece in pieces]
    if not write_generation(run.store, slices, generation=generation, first_part=first, based_on=based_on, run_id=run.run_id):
        raise UserError(
            f"another retry of {run.location} was planned at the same moment, and this one was not: "
            f"see `producer status {run.location}`"
        )
    run.withdraw_summary()  # else no collector looks at the run again
    run.refresh()
    return Retry(len(chosen), tuple(range(first, first + len(slices))), generation, staged)


def _parts_of(run: Run, failures: Sequence[Failed]) -> set[int]:
    """Return the parts that questions have failed in, and those that they had failed in before.

    A retry may be held up between its look at the failures and its plan, and a repair succeed meanwhile at what had failed:
    by these parts `pack` sees it, and writes no question twice.
    """
    last = {failed.part for failed in failures}
    return last.union(*(run.slice(part).based_on for part in last))


def _wanted(failed: Failed, reasons: Sequence[str], ids: Sequence[str]) -> bool:
    return (not reasons or failed.failure.reason in reasons) and (not ids or failed.failure.question_id in ids)


def _refuse_unknown(run: Run, failures: list[Failed], reasons: Sequence[str], ids: Sequence[str], staged: int) -> None:
    """Raise UserError where there is nothing to retry, or where what is named has not failed."""
    waiting = f"{staged:,} more failed, but their parts are not published yet: retry them later" if staged else ""
    if not failures:
        raise UserError(f"nothing to retry: no published part of {run.location} has a failure{'; ' * bool(waiting)}{waiting}")
    counts = Counter(failed.failure.reason for failed in failures)
    there = ", ".join(f"{reason} ({number:,})" for reason, number in counts.most_common())
    if unknown := [reason for reason in reasons if reason not in counts]:
        raise UserError(
            f"--reason {', '.join(unknown)}: no question has failed so; the reasons are {there}. {waiting}".rstrip()
        )
    failed_ids = dict.fromkeys(failed.failure.question_id for failed in failures)
    if unknown := [question_id for question_id in ids if question_id not in failed_ids]:
        listed = ", ".join(map(short, list(failed_ids)[:_MAX_NAMED]))
        more = f" and {len(failed_ids) - _MAX_NAMED:,} more" if len(failed_ids) > _MAX_NAMED else ""
        raise UserError(
            f"--id {', '.join(map(short, unknown))}: has not failed, or not in a published part; "
            f"failed are {listed}{more} (`producer status {run.location} --failed` lists all). {waiting}".rstrip()
        )
    if not any(_wanted(failed, reasons, ids) for failed in failures):
        raise UserError(f"nothing to retry: no question named by --id has failed with that --reason; the reasons are {there}")


def _refuse_overflow(run: Run, last: int) -> None:
    digits = run.settings.part_digits
    if last >= 10**digits:
        raise UserError(
            f"this retry would make part {last:,}, but the parts of {run.location} have numbers of {digits} digits: "
            "retry fewer at a time (--reason, --id), or run the failed rows as a CSV of their own into another --output-dir"
        )
