"""The message of a question, decoded where it comes in. Whatever is not as `feed` writes it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from storage.stores.location import is_url
from workers.errors import MessageRefusedError

MAX_NAME = 512  # characters of the ids that are for people to read
_MAX_PATH = 4096
_MAX_NUMBER = 10**9


@dataclass(frozen=True, slots=True)
class RunMessage:
    """Which run a message is about."""

    run_dir: str
    run_id: str

    @classmethod
    def decode(cls, arguments: Mapping[str, Any]) -> RunMessage:
        """Check a task's arguments. Raises MessageRefusedError."""
        _check_names(cls, arguments)
        return cls(_directory(arguments["run_dir"]), _text(arguments, "run_id"))


@dataclass(frozen=True, slots=True)
class QuestionMessage:
    """Which question of which run. `question_id` and `image_id` are for people to read, in Flower."""

    run_dir: str
    run_id: str
    part: int
    sequence: int
    question_id: str
    image_id: str

    @classmethod
    def decode(cls, arguments: Mapping[str, Any]) -> QuestionMessage:
        """Check a task's arguments. Raises MessageRefusedError."""
        _check_names(cls, arguments)
        return cls(
            _directory(arguments["run_dir"]),
            _text(arguments, "run_id"),
            _number(arguments, "part", 1),
            _number(arguments, "sequence", 0),
            _text(arguments, "question_id"),
            _text(arguments, "image_id"),
        )


def _check_names(kind: type[RunMessage | QuestionMessage], arguments: Mapping[str, Any]) -> None:
    expected = {field.name for field in fields(kind)}
    if arguments.keys() != expected:
        missing = ", ".join(sorted(expected - arguments.keys())) or "none"
        raise MessageRefusedError(f"its arguments are not a {kind.__name__}'s (missing: {missing})")


def _directory(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > _MAX_PATH or not (value[:1] == "/" or is_url(value)):
        raise MessageRefusedError("its run_dir is neither an absolute path nor a URL")
    return value


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments[name]
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise MessageRefusedError(f"its {name} is not a text of at most {MAX_NAME} characters")
    return value


def _number(arguments: Mapping[str, Any], name: str, least: int) -> int:
    value = arguments[name]
    if type(value) is not int or not least <= value <= _MAX_NUMBER:
        raise MessageRefusedError(f"its {name} is not a number from {least}")
    return value
