"""Kombu's Redis transport, with a look at each message before Celery gets it.

Whoever can write to Redis could else end a worker with one element of a list: text that is no JSON, a message without
properties, a body that is not base64 each raise in kombu's event loop, which is the worker's. And as the message was never
acknowledged, it would end the next worker too. Here such an element is dropped with one line in the log.
"""

from __future__ import annotations

import json
import logging
import time
from base64 import b64decode
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from kombu.transport import redis
from redis.exceptions import ConnectionError as BrokerLostError
from redis.exceptions import OutOfMemoryError

from workers.broker import trouble
from workers.queues import EXTRACT

logger = logging.getLogger(__name__)
_MAX_BODY = 1 << 17  # characters; the largest message of ours has a third of it
_OURS = "halp."
_PAUSE = 2.0  # seconds
_TASKS = (EXTRACT, "workers.collect")


class Channel(redis.Channel):  # type: ignore[misc]
    """A channel that outlives an element that is no JSON, and a connection that was lost before it is closed."""

    _kept: Any = None

    def _connparams(self, *arguments: Any, **options: Any) -> Any:
        """Raise what Celery takes for a lost connection where this channel's own was closed before it.

        Else, after a disconnect, the acknowledgement of a task that had gone on, or the closing of the channel, is an
        AttributeError, which ends the worker. Of another caller: https://github.com/celery/kombu/issues/582
        """
        if self.connection is None or self.connection.client is None:
            raise BrokerLostError("the channel's connection is closed")
        return super()._connparams(*arguments, **options)

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return the channel's client.

        Kombu makes one for each message and acknowledgement, an eighth of a worker's CPU time where the model takes none.
        """
        if asynchronous:
            return super()._create_client(asynchronous)
        if self._kept is None or self._kept.connection_pool is not self.pool:  # a new pool after a lost connection
            self._kept = super()._create_client()
        return self._kept

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except OutOfMemoryError as error:
            # Redis gave the question and then had no room to note that this worker has it. Escaping, this would end the
            # worker. Waiting, it loses one question each pause, which feeding brings back.
            logger.error("the broker %s", trouble(error))
            time.sleep(_PAUSE)
            return True
        except (ValueError, RecursionError) as error:  # of JSON and UTF-8; Redis' own errors are none
            logger.error("dropping something in a queue that is no message: %s", type(error).__name__)
            return True


class Transport(redis.Transport):  # type: ignore[misc]
    """The transport of `redis://` and `rediss://` in our processes."""

    Channel = Channel

    def _deliver(self, message: Any, queue: str) -> None:
        if queue and queue.startswith(_OURS) and (fault := fault_of(message)):
            logger.error("dropping a message from %s: %s", queue, fault)
            return
        super()._deliver(message, queue)


def fault_of(message: Any) -> str | None:
    """Return why something decoded from JSON is not a message of ours; None where it is one."""
    return next(_faults(message), None)


def _faults(message: Any) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"it is a {type(message).__name__}"
        return
    properties, headers = (message.get(name) or None for name in ("properties", "headers"))
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_info"), dict):
        yield "it has no properties"
        return
    if not isinstance(properties.get("delivery_tag"), str):
        yield "it has no delivery tag"
    if not isinstance(headers, dict):
        yield "it has no headers"
        return
    if headers.get("task") not in _TASKS or not isinstance(headers.get("id"), str):
        yield f"its task is {str(headers.get('task'))[:40]!r}, which we have not"
    if not _are_ours(headers):
        yield "its headers have values that we do not use"
    if message.get("content-type") != "application/json":
        yield f"its content type is {str(message.get('content-type'))[:40]!r}; only JSON is taken"
    if fault := _fault_of_body(message.get("body"), properties):
        yield fault


def _are_ours(headers: dict[str, Any]) -> bool:
    if type(headers.get("retries")) is not int or any(headers.get(name) is not None for name in ("expires", "group")):
        return False
    if headers.get("timelimit") not in (None, [None, None]):
        return False
    try:
        return headers.get("eta") is None or datetime.fromisoformat(headers["eta"]).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _fault_of_body(body: Any, properties: dict[str, Any]) -> str | None:
    if not isinstance(body, str) or properties.get("body_encoding") != "base64":
        return "its body is not base64 text"
    if len(body) > _MAX_BODY:
        return f"its body has {len(body):,} characters, more than {_MAX_BODY:,}"
    try:
        content = json.loads(b64decode(body, validate=True))
    except (ValueError, RecursionError):  # of base64, of UTF-8 and of JSON; nested a thousand deep
        return "its body is not JSON in base64"
    match content:
        case [list(), dict(), dict() as options] if all(value is None for value in options.values()):
            return None
    return "its body is not [args, kwargs, nothing more]"
