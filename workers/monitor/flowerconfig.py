"""Flower's settings, read by Flower itself: what a person sees of a task. `workers flower` names this file.

Flower shows a task's arguments and its exception as their reprs. A person looks for the question, the image, the run and the
attempt, and for the reason before the rest.
"""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from typing import Any

from storage.screen.terminal import one_line

tasks_columns = "args,kwargs,state,exception,runtime,received,worker,uuid"
read_only = True

_LONGEST = 200
_PERMANENT = re.compile(r"PermanentError\((?P<arguments>.*)\)", re.DOTALL)
_DIRECTORIES = re.compile(r"(?<![\w.…])/(?:[^/\s:']+/)+")  # the traceback, a click away, has the whole path
_RETRY = re.compile(r"Retry\(Retry\(\.\.\.\), (?P<error>.*), (?P<seconds>[0-9.]+)\)", re.DOTALL)


def format_task(task: Any) -> Any:
    """Return a copy of Flower's record of a task, with its arguments and its exception as people read them."""
    with suppress(ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        # Celery cuts a long repr, and another program's task is not ours to rewrite: then it stays as it is.
        given = ast.literal_eval(task.kwargs)
        run = str(given["run_dir"]).rstrip("/").rpartition("/")[2]
        if "question_id" in given:
            attempt = f"attempt {int(task.retries or 0) + 1}"
            where = f"{attempt} · run {run} · part {given['part']}, #{given['sequence']}"
            task.args = f"{_short(given['question_id'])} · {_short(given['image_id'])}"
            task.kwargs = where
        else:
            task.args, task.kwargs = "the collector's", f"run {run}"
    if task.exception:
        task.exception = _DIRECTORIES.sub("…/", _reason(task.exception))
    return task


def _reason(exception: str) -> str:
    """Return `image_missing: …` for a PermanentError, and the error alone for the Retry that Celery wraps it in."""
    if retry := _RETRY.fullmatch(exception):
        return f"{_short(retry['error'])}, again in {float(retry['seconds']):.0f} s"
    found = _PERMANENT.fullmatch(exception)
    if found is not None:
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            reason, message = ast.literal_eval(f"({found['arguments']})")
            return f"{reason}: {_short(message)}"
    return _short(exception)


def _short(text: Any) -> str:
    text = one_line(str(text))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
