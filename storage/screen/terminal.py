r"""The terminal: whatever is printed goes through here, so that no text from outside can command it.

Ids, questions, answers, names and messages come from strangers' tables, files and queues. ESC and its like move the cursor, set
the window's title and write the clipboard; overrides of direction show `gnp.exe` as `exe.png`. They are shown as `\x1b` and
`\u202e`; other text stays as it is. Nothing is taken for rich's markup: `a[/b]` is a name.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from typing import Any

# Control characters (C0 but line feed and tab, DEL, C1), what breaks a line or has no width, overrides of direction, and lone
# surrogates, which stand for bytes that are no UTF-8 and cannot be printed. The joiners U+200C and U+200D are ordinary text.
_HIDDEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
_IN_TEXT, _IN_LINE = re.compile(f"[{_HIDDEN}]"), re.compile(f"[\t\n{_HIDDEN}]")


def visible(text: str) -> str:
    """Return a text as a terminal may have it: hidden characters as their escapes. Its lines stay."""
    return text if text.isprintable() else _IN_TEXT.sub(_escape, text)


def one_line(text: str) -> str:
    """Return a stranger's text for a line of ours: it cannot begin another one."""
    return text if text.isprintable() else _IN_LINE.sub(_escape, text)


def duration(seconds: float) -> str:
    """Return a time as people say it: `2 h 05 min`, `4 min 10 s`, `30 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def amount(number: int, noun: str) -> str:
    """Return how many there are of something: `1 part`, `2,000 parts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def echo(text: object, *, err: bool = False) -> None:
    """Print a text and a line feed; on stderr what is not the command's result."""
    file = sys.stderr if err else sys.stdout
    file.write(f"{visible(str(text))}\n")
    file.flush()


def echo_json(body: object, indent: int | None = None) -> None:
    """Print one JSON object, in ASCII: exact, and nothing that a terminal obeys. JSON itself leaves DEL as it is."""
    sys.stdout.write(json.dumps(body, indent=indent).replace("\x7f", "\\u007f") + "\n")
    sys.stdout.flush()


def guard_logs() -> None:
    """Make hidden characters visible in every line that this process logs, whoever logs it: arguments come from outside."""
    logging.setLogRecordFactory(_record)


def _record(*arguments: Any, **options: Any) -> logging.LogRecord:
    record = logging.LogRecord(*arguments, **options)
    try:
        record.msg, record.args = visible(record.getMessage()), ()
    except (TypeError, ValueError, KeyError):  # a line that does not fit its arguments: logging itself says so
        record.msg, record.args = visible(f"{record.msg!r} {record.args!r}"), ()
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = visible("".join(traceback.format_exception(*record.exc_info)).rstrip())
    return record
