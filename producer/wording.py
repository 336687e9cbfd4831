"""The wording of a table's questions: which of its columns a prompt takes."""

from __future__ import annotations

from collections.abc import Sequence

from producer.options import RunOptions
from storage.computation import QUESTION
from storage.errors import UserError
from storage.question import Question
from storage.runs.run import Run, is_run
from storage.stores.location import resolve_location
from storage.wording import LoneBraceError, column_names, values

_MAX_NAMED = 20  # columns in a message


def takes_columns(options: RunOptions, questions: Sequence[Question]) -> bool:
    """Tell whether a prompt names columns or braces beside `{question}`. Raises UserError for a column that is not there.

    The run that it resumes knows: one from before there were columns takes every other brace as it stands.
    """
    prompt, location = options.computation.prompt, resolve_location(options.output_dir)
    if is_run(location) and (begun := Run.open(location).settings).prompt == prompt:
        return begun.prompt_columns
    if not set("{}") & set(prompt.replace(QUESTION, "")):
        return False
    try:
        names = column_names(prompt)
    except LoneBraceError as error:
        raise UserError(f"--prompt {prompt!r}: {error}: write {{name}} for a column and {{{{ or }}}} for a brace") from error
    there = _columns(questions)
    if unknown := [name for name in names if name not in values(questions[0]) or name not in there]:
        listed = ", ".join(there[:_MAX_NAMED]) + (", …" if len(there) > _MAX_NAMED else "")
        raise UserError(
            f"--prompt {prompt!r}: the table has no column {', '.join(map(repr, unknown))}; it has {listed}. "
            "Write {{ and }} for braces"
        )
    return True


def _columns(questions: Sequence[Question]) -> list[str]:
    """Return the columns that a prompt may take, by all their accepted names; of answers only where there are some."""
    answers = ("answer", "gt_answer") if any(question.ground_truth_answer for question in questions) else ()
    return list(dict.fromkeys(("question_id", "image_id", "image_name", "question", *answers, *questions[0].extra)))
