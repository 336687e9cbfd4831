"""JSON: a line for each object (POPE), a list of them (LLaVA), an object that holds the list (VQAv2), or one by ids (GQA)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from producer.dataset.faults import Faults
from producer.dataset.forms.delimited import MAX_FIELD
from producer.dataset.forms.file import TableFile, as_utf8, opened_file
from producer.dataset.forms.row import Opened, Row
from producer.show.progress import Done, counted
from storage.errors import UserError

_MAX_LINE = 64 * MAX_FIELD
_ID = "question_id"


class JsonRows(TableFile):
    """A `.jsonl`, or a `.json`; `.gz` behind it or not."""

    def __init__(self, path: Path, *, lines: bool) -> None:
        super().__init__(path)
        self._lines = lines
        self.line = "line" if lines else "entry"

    @contextmanager
    def opened(self, faults: Faults, done: Done) -> Iterator[Opened]:
        """Read all of it: which columns there are is known at its end. A row's place is its line, or its number in the list."""
        with opened_file(self._path) as (data, digested):
            text = as_utf8(data)
            if self._lines:
                found = list(counted(_of_lines(text, faults), lambda _: done(digested.size)))
            else:
                found = list(self._of_list(text.read(), faults))
        self.sha256 = digested.sha256.hexdigest()
        columns = dict.fromkeys(name for _, cells in found for name in cells)
        yield Opened(found[0].where if found else "line 1", list(columns), iter(found))

    def _of_list(self, text: str, faults: Faults) -> Iterator[Row]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            hint = "; one object a line is .jsonl" if isinstance(error, ValueError) and "Extra data" in str(error) else ""
            raise UserError(f"{self._path} is no JSON ({error}): write it again{hint}") from error
        for number, (key, entry) in enumerate(_entries(value, self._path), start=1):
            if not isinstance(entry, dict):
                faults.add(f"entry {number}: it is no object: write one for each question")
                continue
            yield Row(f"entry {number}", _cells(entry if key is None else {_ID: key, **entry}))


def _of_lines(text: Any, faults: Faults) -> Iterator[Row]:
    number = 0
    while line := text.readline(_MAX_LINE):
        number += 1
        if not line.strip():
            continue
        if len(line) == _MAX_LINE and not line.endswith("\n"):
            faults.add(f"line {number}: it has {_MAX_LINE:,} characters or more: is it JSON with an object a line?")
            return
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.add(f"line {number}: it is no JSON ({error}): write the line again")
            continue
        if not isinstance(entry, dict):
            faults.add(f"line {number}: it is no object: write one for each question")
            continue
        yield Row(f"line {number}", _cells(entry))


def _entries(value: Any, path: Path) -> Iterator[tuple[str | None, Any]]:
    """Yield the objects in a JSON, each with its key where it has one."""
    if isinstance(value, list):
        yield from ((None, entry) for entry in value)
        return
    members = value if isinstance(value, dict) else {}
    lists = [one for one in members.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
    if len(lists) > 1:
        raise UserError(f"{path} holds {len(lists)} lists of objects: write a file with the questions alone")
    if lists:
        yield from ((None, entry) for entry in lists[0])
    elif members and all(isinstance(entry, dict) for entry in members.values()):
        yield from members.items()
    else:
        raise UserError(f"{path} holds no list of objects: write one object for each question")


def _cells(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an object's members; of LLaVA's conversations the first question and its answer too."""
    turns = entry.get("conversations")
    if not isinstance(turns, list) or "question" in entry:
        return entry
    said = [(turn.get("from"), turn.get("value")) for turn in turns if isinstance(turn, dict)]
    asked = next((i for i, (who, _) in enumerate(said) if who in ("human", "user")), None)
    if asked is None:
        return entry
    answer = next((text for who, text in said[asked + 1 :] if who in ("gpt", "assistant")), "")
    rest = {name: value for name, value in entry.items() if name != "conversations"}
    return {**rest, "question": said[asked][1], **({} if "answer" in entry else {"answer": answer})}
