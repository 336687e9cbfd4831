"""Which column of a table is what: by the names that datasets use, or as the user says."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from producer.dataset.faults import short
from producer.dataset.forms.row import as_text
from storage.errors import UserError
from storage.hdf5.part import QUESTION_ATTRIBUTES

# Accepted names, the preferred one first; the others are carried where a table has several.
NAMES = {
    "question_id": ("question_id", "id", "index", "qid", "questionId", "__key__"),
    "image": ("image_id", "image_name", "image", "image_path", "images", "img", "imageId", "image_file", "file_name"),
    "question": ("question", "text", "query", "txt"),
    "answer": ("answer", "gt_answer", "label", "ground_truth"),
}
_OURS = {"question_id": "question_id", "image": "image_id", "question": "question", "answer": "answer"}
_MAX_NAME = 512  # characters of a column's name, which becomes a name in HDF5: 64 KiB there at most
_MAX_COLUMNS = 20  # named in a message
BAD_CHARACTER = re.compile(r"[\0\ud800-\udfff]")  # a surrogate stands for a byte that was not UTF-8


@dataclass(frozen=True, slots=True)
class Roles:
    """Where a question's parts are: a column each, or a template of columns such as `COCO_{image_id:0>12}.jpg`."""

    question_id: str | None  # None: rows are numbered
    image: str | None  # None: of questions that are asked without
    question: str
    answer: str | None
    carried: tuple[str, ...]  # the other columns

    def value(self, role: str, cells: Mapping[str, Any]) -> Any:
        """Return what a row has for a role."""
        name = getattr(self, role)
        if name is None:
            return None
        return cells.get(name) if "{" not in name else _Filled().vformat(name, (), cells)

    @property
    def said(self) -> str | None:
        """Return which column was taken for what; None where all of them have our own names."""
        found = {role: getattr(self, role) for role in NAMES}
        if all(name in (None, _OURS[role], "image_name", "gt_answer") for role, name in found.items()) and self.question_id:
            return None
        named = [f"{role} from {short(name)}" for role, name in found.items() if name is not None]
        numbered = [] if self.question_id else ["question ids are row numbers"]
        return "; ".join([", ".join(named), *numbered])


def parse_columns(asked: Sequence[str]) -> dict[str, str]:
    """Return what `--columns question=text,answer=label` says: role to column. Raises UserError."""
    found: dict[str, str] = {}
    for pair in (pair for text in asked for pair in text.split(",")):
        role, equals, name = (part.strip() for part in pair.partition("="))
        role = "image" if role == "image_id" else role
        if not equals or role not in NAMES or not name:
            raise UserError(f"--columns {pair!r}: write a role and a column, as in question=text; roles: {', '.join(NAMES)}")
        if role in found:
            raise UserError(f"--columns: {role} is named twice")
        found[role] = name
    return found


def roles_of(
    columns: Sequence[str], first: Mapping[str, Any], asked: Mapping[str, str], image: str | None, *, blind: bool = False
) -> Roles:
    """Return the roles of a table's columns, by its first row too; `image`: the column that the form itself names.

    `blind`: there need be no images. Raises ValueError with every problem of the columns.
    """
    problems = _problems_of_names(columns)
    if unknown := [problem for role, name in asked.items() for problem in _unknown(role, name, columns)]:
        raise ValueError("; ".join(unknown))
    found: dict[str, str | None] = {}
    for role, names in NAMES.items():
        if role in asked:
            found[role] = asked[role]
        elif role == "image":
            found[role] = image or _image_column(columns, first)
        else:
            found[role] = next((name for name in names if name in columns), None)
    missing = [role for role in ("image", "question") if found[role] is None and not (blind and role == "image")]
    if missing and not any("UTF-8" in problem for problem in problems):
        problems = [*_missing(missing, columns), *problems]
    taken = {name for name in found.values() if name is not None}
    said = {field for name in taken for field in _fields(name) if field in QUESTION_ATTRIBUTES}  # by a template
    carried = [name for name in columns if name not in taken | said and not _holds_bytes(first.get(name))]
    for name in carried:
        if name in QUESTION_ATTRIBUTES:
            problems.append(f"column {name!r} has a name that the output itself uses: rename it")
        elif len(name) > _MAX_NAME:
            problems.append(f"column {short(name)} has a name of more than {_MAX_NAME} characters: shorten it")
    if problems:
        raise ValueError("; ".join(problems))
    assert found["question"] is not None
    return Roles(found["question_id"], found["image"], found["question"], found["answer"], tuple(carried))


def _image_column(columns: Sequence[str], first: Mapping[str, Any]) -> str | None:
    """Return the column that holds images, before one that names them: where a hub's table has both, the name is a number."""
    there = [name for name in NAMES["image"] if name in columns]
    return next((name for name in there if _holds_bytes(first.get(name))), there[0] if there else None)


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_bytes, value))
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return value is not None and not isinstance(value, (str, int, float, bool))


def _problems_of_names(names: Sequence[str]) -> list[str]:
    if any(BAD_CHARACTER.search(name) for name in names):
        return ["the columns' names are not UTF-8 text: save the table as CSV in UTF-8 (gzip only as .csv.gz)"]
    return [
        f"{number} columns are named {short(name)}: rename or remove all but one"
        for name, number in Counter(names).items()
        if number > 1
    ]


def _missing(roles: Sequence[str], names: Sequence[str]) -> list[str]:
    problems = [f"no column {' or '.join(NAMES[role][:4])}" for role in roles]
    more = ", …" if len(names) > _MAX_COLUMNS else ""
    problems.append(f"the columns are {', '.join(map(short, names[:_MAX_COLUMNS]))}{more}")
    separators = [(mark, word) for mark, word in ((";", "semicolons"), ("\t", "tabs")) if mark in "".join(names)]
    for mark, word in separators:
        cure = "name it .tsv" if mark == "\t" else "save it with commas"
        problems.append(f"it looks separated by {word}: {cure}")
    if not separators:
        problems.append("--columns says which is which, as in --columns image=photo,question=text")
        problems += ["--blind asks without images"] * (list(roles) == ["image"])
    return problems


def _unknown(role: str, name: str, columns: Sequence[str]) -> list[str]:
    try:
        unknown = [field for field in _fields(name) or [name] if field not in columns]
    except ValueError as error:
        return [f"--columns {role}={name}: {error}"]
    listed, named = (", ".join(map(short, names)) for names in (columns[:_MAX_COLUMNS], unknown))
    return [f"--columns {role}={name}: there is no column {named}; there are {listed}"] if unknown else []


def _fields(name: str) -> list[str]:
    """Return the columns that a template takes; none of a column's name. Raises ValueError."""
    return [field for _, field, _, _ in string.Formatter().parse(name) if field is not None] if "{" in name else []


class _Filled(string.Formatter):
    """Fills `{name}` and `{name:0>12}` with a row's texts, and looks into nothing."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        return as_text(kwargs.get(field_name)), field_name
