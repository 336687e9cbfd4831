"""Whether runs can be merged: finished, of one kind, and without a question in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import UserError
from storage.runs.account import Bookkeeper
from storage.runs.run import Run
from storage.settings import ModelFacts

# Which of a table's questions a run takes, how they are cut into parts, and where things lie.
_MAY_DIFFER = {
    "shard", "limit", "test", "order", "checkpoint_interval", "merged", "images_dir", "image_roots", "model_slug",
}  # fmt: skip
_MAX_NAMED, _MAX_SHOWN = 10, 100


@dataclass(frozen=True, slots=True)
class Members:
    """Runs that can be merged but for their questions' ids."""

    runs: tuple[Run, ...]

    @classmethod
    def open(cls, locations: Sequence[str]) -> Members:
        """Open runs and compare them. Raises UserError that names what is not finished, or in what they differ."""
        if len(locations) < 2:
            raise UserError("name two runs at least: there is nothing to merge")
        runs = tuple(map(Run.open, locations))
        first_of: dict[str, Run] = {}
        for run in runs:
            if (other := first_of.setdefault(run.run_id, run)) is not run:
                raise UserError(f"{other.location} and {run.location} are one run: name each once")
        if unfinished := [sentence for run in runs for sentence in _unfinished(run)]:
            raise UserError("only finished runs can be merged:\n" + "\n".join(f"  {sentence}" for sentence in unfinished))
        members = cls(runs)
        if differences := [line for run in runs[1:] for line in _differences(runs[0], run)]:
            shown = "\n".join(f"  {line}" for line in differences)
            raise UserError(f"these runs differ in what they compute, and cannot be merged:\n{shown}")
        return members

    def facts(self) -> ModelFacts | None:
        """Return what the runs' model is; None where no worker ever loaded it."""
        return next((facts for run in self.runs if (facts := run.model_facts()) is not None), None)

    def refuse_equal_ids(self) -> None:
        """Raise UserError that names the questions which several runs have."""
        first_of: dict[str, Run] = {}
        equal: dict[str, Run] = {}
        for run in self.runs:
            for piece in run.slices:
                for question in () if piece.is_retry else run.questions(piece.part):
                    if first_of.setdefault(question.question_id, run) is not run:
                        equal[question.question_id] = run
        if not equal:
            return
        named = [f"  {i!r} in {first_of[i].location} and in {equal[i].location}" for i in list(equal)[:_MAX_NAMED]]
        more = f"\n  and {len(equal) - _MAX_NAMED:,} more" if len(equal) > _MAX_NAMED else ""
        number = "1 question is" if len(equal) == 1 else f"{len(equal):,} questions are"
        raise UserError(f"{number} in several of these runs, which cannot be merged:\n" + "\n".join(named) + more)


def _unfinished(run: Run) -> Iterator[str]:
    books = Bookkeeper(run)
    account = books.account()
    if not account.finished:
        missing = account.planned - account.written - account.failed
        yield f"{run.location} has {missing:,} of {account.planned:,} questions to go (`producer status {run.location}`)"
    yield from (f"{run.location}: {lost}" for lost in books.lost_parts())


def _differences(first: Run, second: Run) -> Iterator[str]:
    ours, theirs = first.settings_by(), second.settings_by()
    differing = {name: pair for name, pair in ours.differences(theirs).items() if name not in _MAY_DIFFER}
    if "model_digest" not in differing:
        differing.pop("model", None)  # it lies elsewhere
    if ours.prompt_columns != theirs.prompt_columns:
        differing["prompt_columns"] = (ours.prompt_columns, theirs.prompt_columns)
    if (recorded := first.model_facts()) is not None and (other := second.model_facts()) is not None:
        pairs = zip(recorded.model_dump().items(), other.model_dump().values())
        differing |= {name: (a, b) for (name, a), b in pairs if a != b and name not in differing}
    for name, (a, b) in differing.items():
        called = "the table's content (SHA-256)" if name == "dataset_sha256" else name
        yield f"{called}: {_show(a)} in {first.location}, {_show(b)} in {second.location}"


def _show(value: Any) -> str:
    text = "the default" if value is None else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
