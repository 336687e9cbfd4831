"""Flower's settings, read by Flower itself: what a person sees of a task. `workers flower` names this file.

Flower shows a task's arguments and its exception as their reprs. A person looks for the question, the image, the run and the
attempt, and for the reason before the rest.
"""

from __future__ import annotations

import ast
import re
from typing import Any

tasks_columns = "kwargs,state,retries,exception,runtime,received,worker,uuid"
read_only = True

_LONGEST = 200
_PERMANENT = re.compile(r"PermanentError\((?P<arguments>.*)\)", re.DOTALL)


def format_task(task: Any) -> Any:
    """Return a copy of Flower's record of a task, with its arguments and its exception as people read them."""
    task.kwargs = _arguments(task)
    if task.exception:
        task.exception = _reason(task.exception)
    return task


def _arguments(task: Any) -> Any:
    try:
        given = ast.literal_eval(task.kwargs)
        run = str(given["run_dir"]).rstrip("/").rpartition("/")[2]
        if "question_id" not in given:
            return f"run {run}"
        question, image = _short(given["question_id"]), _short(given["image_id"])
        where = f"part {given['part']}, #{given['sequence']}"
        return f"question {question} · {image} · run {run} · attempt {int(task.retries or 0) + 1} · {where}"
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return task.kwargs  # Celery cuts a long repr, and other programs' tasks are not ours to rewrite


def _reason(exception: str) -> str:
    """Return `image_missing: …` for a PermanentError, whose arguments are its reason and its message."""
    found = _PERMANENT.fullmatch(exception)
    try:
        if found is not None:
            reason, message = ast.literal_eval(f"({found['arguments']})")
            return f"{reason}: {_short(message)}"
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    return _short(exception)


def _short(text: Any) -> str:
    text = str(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
