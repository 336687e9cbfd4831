"""The envelope of a message: read where it comes out of Redis, and made anew from the few values that are ours.

Celery and kombu trust a message: a wrong type in any of some twenty fields (`content-encoding`, `stamped_headers`, and so on)
raises in the event loop, which is the worker's; as the message is not acknowledged then, it ends the next worker too. So
nothing that a stranger wrote gets to them but what is checked here: a question or a hint to the collector, one of a few
commands that only ask, and what Flower listens to.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from kombu.utils.uuid import uuid

from workers.errors import MessageRefusedError
from workers.queue.message import QuestionMessage, RunMessage
from workers.queue.queues import COLLECT, EXTRACT, OURS

MAX_MESSAGE = 1 << 18  # bytes; the largest message of ours has a fifth of it
_MAX_OTHER = 1 << 24  # bytes of an answer to Flower
_MAX_BODY = 1 << 17  # characters
_MAX_NAME = 600
_MAX_RETRIES = 10**6  # a full disk is waited for with retries
_LONGEST_WAIT = timedelta(seconds=60)  # of a question for its next attempt
_LONGEST_SKEW = timedelta(hours=1)  # between two machines' clocks
_MAX_REPR = 1024  # characters of a message's arguments that Flower shows
_MAILBOX, _REPLIES = ".celery.pidbox", "reply.celery.pidbox"
# What Flower asks a worker, and `celery inspect ping`. What would change a worker is not obeyed: a worker's machine stops it.
_COMMANDS = frozenset(("ping", "stats", "active_queues", "registered", "scheduled", "active", "reserved", "revoked", "conf"))


class NotOursError(Exception):
    """Something in Redis that is no message of ours; the text says why."""


def read(data: bytes, queue: str) -> dict[str, Any]:
    """Return the message in what a queue gave, for kombu. Raises NotOursError."""
    return remake(decode(data, MAX_MESSAGE if queue.startswith(OURS) else _MAX_OTHER), queue)


def decode(data: bytes, limit: int = MAX_MESSAGE) -> Any:
    """Return what some JSON says, without kombu's types in it. Raises NotOursError; too much is not even looked at."""
    if len(data) > limit:
        raise NotOursError(f"it has {len(data):,} bytes, more than {limit:,}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8; nested a thousand deep
        raise NotOursError(f"it is no JSON ({type(error).__name__})") from error


def remake(message: Any, queue: str) -> dict[str, Any]:
    """Return a decoded message with nothing in it but what is known to be sound. Raises NotOursError."""
    headers = _headers(message)
    if queue.startswith(OURS):
        return _task(headers, _body(message, _MAX_BODY), queue)
    body = _body(message, _MAX_OTHER)
    if queue.endswith(_MAILBOX) and not queue.endswith(_REPLIES):
        return _whole({}, _command(body), queue)
    kept = {name: value for name in ("ticket", "hostname") if isinstance(value := headers.get(name), str)}
    events = body if isinstance(body, list) else [body]
    if not all(isinstance(event, dict) for event in events):
        raise NotOursError("it is neither an answer nor an event")
    info = message["properties"].get("delivery_info") if isinstance(message.get("properties"), dict) else None
    key = info.get("routing_key") if isinstance(info, dict) else None
    return _whole(kept, body, key if isinstance(key, str) else queue)


def _headers(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise NotOursError(f"it is a {type(message).__name__}")
    if not isinstance(headers := message.get("headers"), dict):
        raise NotOursError("it has no headers")
    if (kind := message.get("content-type")) != "application/json":
        raise NotOursError(f"its content type is {_shown(kind)}; only JSON is taken")
    if (kind := message.get("content-encoding")) != "utf-8":
        raise NotOursError(f"its content encoding is {_shown(kind)}; only utf-8 is taken")
    return headers


def _body(message: dict[str, Any], limit: int) -> Any:
    body, properties = message.get("body"), message.get("properties")
    encoding = properties.get("body_encoding") if isinstance(properties, dict) else None
    if not isinstance(body, str) or encoding != "base64":
        raise NotOursError("its body is not base64 text")
    if len(body) > limit:
        raise NotOursError(f"its body has {len(body):,} characters, more than {limit:,}")
    try:
        data = b64decode(body, validate=True)
        if b"__type__" in data:  # kombu would make an object of it
            raise NotOursError("its body has more than plain JSON in it")
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # of base64, of UTF-8 and of JSON; nested a thousand deep
        raise NotOursError("its body is not JSON in base64") from error


def _task(headers: dict[str, Any], body: Any, queue: str) -> dict[str, Any]:
    task = "workers.collect" if queue == COLLECT else EXTRACT
    if headers.get("task") != task:
        raise NotOursError(f"its task is {_shown(headers.get('task'))}, which we have not there")
    if any(headers.get(name) for name in ("expires", "group")) or headers.get("timelimit") not in (None, [None, None]):
        raise NotOursError("its headers have values that we do not use")
    number, name = headers.get("retries"), headers.get("id")
    if type(number) is not int or not 0 <= number <= _MAX_RETRIES:
        raise NotOursError(f"its number of retries is {_shown(number)}")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise NotOursError("its id is no name")
    arguments = _arguments(body, task)
    options: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    kept: dict[str, Any] = {
        "lang": "py", "task": task, "id": name, "root_id": name, "parent_id": None, "group": None, "retries": number,
        "eta": _eta(headers.get("eta")), "expires": None, "timelimit": [None, None],
        "argsrepr": "()", "kwargsrepr": str(arguments)[:_MAX_REPR],
    }  # fmt: skip
    if type(passed := headers.get("halp_passed")) is int and 0 <= passed <= _MAX_RETRIES:
        kept["halp_passed"] = passed
    return _whole(kept, [[], arguments, options], queue, name)


def _arguments(body: Any, task: str) -> dict[str, Any]:
    match body:
        case [[], dict() as arguments, dict() as options] if not any(options.values()):
            try:
                (QuestionMessage if task == EXTRACT else RunMessage).decode(arguments)
            except MessageRefusedError as error:
                raise NotOursError(str(error)) from error
            return arguments
    raise NotOursError("its body is not [no args, kwargs, nothing more]")


def _eta(text: Any) -> str | None:
    """Return when a question is to be tried: a far time would hold a place in the worker until then."""
    if text is None:
        return None
    now = datetime.now(UTC)
    try:
        wait = datetime.fromisoformat(text) - now  # TypeError also where it has no time zone
    except (TypeError, ValueError, OverflowError) as error:
        raise NotOursError(f"its time is {_shown(text)}") from error
    if wait > _LONGEST_WAIT + _LONGEST_SKEW:
        raise NotOursError(f"its time is {_shown(text)}, which is too far ahead")
    return None if wait <= timedelta(0) else (now + min(wait, _LONGEST_WAIT)).isoformat()


def _command(body: Any) -> dict[str, Any]:
    method = body.get("method") if isinstance(body, dict) else None
    if not isinstance(method, str) or method not in _COMMANDS:
        raise NotOursError(f"its command is {_shown(method)}, which is not obeyed")
    to, ticket, reply = (body.get(name) for name in ("destination", "ticket", "reply_to"))
    if body.get("pattern") is not None or not (to is None or (isinstance(to, list) and all(map(_is_name, to)))):
        raise NotOursError("it is not said plainly for whom it is")  # a pattern may take for ever to match
    if ticket is not None and not _is_name(ticket):
        raise NotOursError("its ticket is no name")
    if reply is not None and not _is_reply(reply):
        raise NotOursError("the answer is to go where no answer goes")
    return {
        "method": method, "arguments": {"safe": True} if method == "active" else {}, "destination": to, "pattern": None,
        "matcher": None, "ticket": ticket, "reply_to": reply,
    }  # fmt: skip


def _is_reply(place: Any) -> bool:
    return isinstance(place, dict) and place.get("exchange") == _REPLIES and _is_name(place.get("routing_key"))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_NAME and value.isprintable()


def _whole(headers: Mapping[str, Any], body: Any, routing_key: str, name: str | None = None) -> dict[str, Any]:
    return {
        "body": b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": dict(headers),
        "properties": {
            "correlation_id": name, "reply_to": None, "delivery_mode": 2, "priority": 0, "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": routing_key}, "delivery_tag": uuid(),
        },
    }  # fmt: skip


def _shown(value: Any) -> str:
    return ascii(value if isinstance(value, str | int | float | None) else type(value).__name__)[:40]
