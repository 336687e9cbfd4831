"""Adding rows to a run: a table that has grown, and a generation of the plan with its new questions."""

from __future__ import annotations

from collections.abc import Sequence

from producer.dataset.faults import Faults, short
from producer.dataset.selection import cut
from producer.show.progress import Phases, counted, silent
from storage.errors import UserError
from storage.question import Question
from storage.runs.plan import Grown, write_generation
from storage.runs.run import Run, is_run
from storage.screen.terminal import amount
from storage.settings import RunSettings
from storage.stores.location import resolve_location

_TEXTS = {"image_id": "image", "question": "question", "ground_truth_answer": "answer"}


def as_before(output_dir: str, asked: RunSettings) -> RunSettings:
    """Return what is asked for with the table that the run has now: in that alone they may differ. Raises UserError."""
    location = resolve_location(output_dir)
    if not is_run(location):
        raise UserError(f"--append: {output_dir} holds no run: the first command begins it without")
    run = Run.open(location)
    if not run.slices:
        raise UserError(f"--append: {output_dir} is not planned yet: give the command first that it was begun with")
    now = run.settings_by()
    table = {"dataset": now.dataset, "dataset_sha256": now.dataset_sha256, "limit": now.limit}
    return asked.model_copy(update=table)


def append(run: Run, new: Sequence[Question], asked: RunSettings, phases: Phases = silent) -> None:
    """Plan what `new_questions` has found, in parts of their own. Killed at any point, the same call goes on.

    Where it has found nothing, as in a shard, the plan notes the table: it is the run's from now on.
    Raises UserError where something else was planned in between.
    """
    now, table = run.settings_by(), Grown(asked.dataset, asked.dataset_sha256, asked.limit)
    if not new and (now.dataset_sha256, now.limit) == (table.dataset_sha256, table.limit):
        return  # it was appended before: perhaps by a command that was killed then
    interval = run.settings.checkpoint_interval
    number, first = -(-len(new) // interval), 1 + run.slices[-1].part
    if first + number - 1 >= 10**run.settings.part_digits:
        raise UserError(
            f"--append would make part {first + number - 1:,}, but the parts of {run.location} have numbers of "
            f"{run.settings.part_digits} digits: run the new rows as a table of their own into another --output-dir"
        )
    if not write_generation(
        run.store,
        counted(cut(new, interval), phases("writing the plan", number), step=1),
        generation=run.next_generation,
        first_part=first,
        grown=table,
        run_id=run.run_id,
    ):
        raise UserError(f"something else was planned in {run.location} at the same moment: give the command again")
    run.withdraw_summary()  # else no collector looks at the run again
    run.refresh()


def new_questions(run: Run, questions: Sequence[Question]) -> list[Question]:
    """Return those of a table's questions that a run does not have, in their order.

    Raises UserError where one that it has is another one now, or gone.
    """
    now = {question.question_id: question for question in questions}
    faults, planned = Faults(), set()
    for piece in run.slices:
        for before in () if piece.is_retry else run.questions(piece.part):
            planned.add(before.question_id)
            if (fault := _fault(before, now.get(before.question_id))) is not None:
                faults.add(f"question {short(before.question_id)}: {fault}")
    if faults.number:
        raise UserError(
            f"--append adds questions and changes none. Of {run.location}, {amount(faults.number, 'question')} changed or gone:"
            f"\n{faults}\nPut them back as they were, or begin a new run in another --output-dir."
        )
    return [question for question_id, question in now.items() if question_id not in planned]


def _fault(before: Question, now: Question | None) -> str | None:
    """Say in what a question is another one now; its place in the table may change."""
    if now is None:
        return "it is not in the table, or not among the rows that are taken"
    for name, called in _TEXTS.items():
        if (old := getattr(before, name)) != (new := getattr(now, name)):
            return f"its {called} was {short(old)} and is {short(new)}"
    for name in before.extra | now.extra:
        if (old := before.extra.get(name)) != (new := now.extra.get(name)):
            return f"its column {short(name)} {_change(old, new)}"
    return None


def _change(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return "is new" if old is None else "is gone"
    return f"was {short(old)} and is {short(new)}"
