"""The wording: what the model is asked about a row, by the run's prompt and the row's columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from storage.computation import QUESTION
from storage.question import Question

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|([{}])")
_BRACES = {"{{": "{", "}}": "}"}
Piece = tuple[str, str | None]  # a text, and the column whose value follows it


class LoneBraceError(ValueError):
    """A prompt has a brace that belongs to no column's name and is not doubled."""


def asked(prompt: str, question: Question, *, columns: bool) -> str:
    """Return what the model is asked.

    columns: `{name}` is the row's value in a column, as it stands and if it is empty nothing; `{{` and `}}` are braces.
        Otherwise only `{question}` is replaced, as in runs from before there were columns. What is inserted is not looked at
        again: a brace in a question is a brace.
    """
    if not columns:
        return prompt.replace(QUESTION, question.question)
    row = values(question)
    return "".join(text if name is None else text + row[name] for text, name in pieces(prompt))


def values(question: Question) -> Mapping[str, str]:
    """Return a row's values by the names of its columns; those with two accepted names have both."""
    own = {
        "question_id": question.question_id,
        "image_id": question.image_id,
        "image_name": question.image_id,
        "question": question.question,
        "answer": question.ground_truth_answer,
        "gt_answer": question.ground_truth_answer,
    }
    return own | question.extra


def column_names(prompt: str) -> list[str]:
    """Return the columns that a prompt names, each once. Raises LoneBraceError."""
    return list(dict.fromkeys(name for _, name in pieces(prompt) if name is not None))


@lru_cache(maxsize=64)
def pieces(prompt: str) -> tuple[Piece, ...]:
    """Return a prompt's texts and columns in order. Raises LoneBraceError."""
    found: list[Piece] = []
    text, end = "", 0
    for match in _PIECE.finditer(prompt):
        text += prompt[end : match.start()]
        end = match.end()
        if match[2] is not None:
            raise LoneBraceError(f"the {match[2]} at character {match.start() + 1} stands alone")
        if match[1] is None:
            text += _BRACES[match[0]]
        else:
            found.append((text, match[1]))
            text = ""
    return (*found, (text + prompt[end:], None))
