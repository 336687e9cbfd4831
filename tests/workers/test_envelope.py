"""Whatever a stranger writes into a message's fields: it is no message, or Celery gets one in which nothing is theirs."""

from __future__ import annotations

import base64
import copy
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.request import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.transport.virtual import Channel, Message

from tests.workers.test_messages import GOOD, LANE, message
from workers import tasks
from workers.queue.app import app
from workers.queue.envelope import MAX_MESSAGE, NotOursError, read, remake
from workers.queue.queues import COLLECT

MAILBOX = "extract-1@host.celery.pidbox"
CHANNEL = SimpleNamespace(decode_body=Channel.decode_body, codecs=Channel.codecs)
CHANNEL.decode_body = lambda body, encoding: Channel.decode_body(CHANNEL, body, encoding)  # type: ignore[arg-type]


def control(method: object = "ping", **changes: Any) -> dict[str, Any]:
    reply = {"exchange": "reply.celery.pidbox", "routing_key": "0b1e"}
    content = {"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None,
               "ticket": "0b1e", "reply_to": reply, **changes}  # fmt: skip
    return message(headers={"clock": 1}, body=base64.b64encode(json.dumps(content).encode()).decode())


def as_celery_reads_it(taken: dict[str, Any]) -> Request:
    """Go the way that a message goes in a worker's event loop."""
    received = Message(taken, channel=CHANNEL)
    request = Request(received, app=app, task=tasks.extract, headers=received.headers, body=received.body)
    assert request.eta is None or request.eta < datetime.now(UTC) + timedelta(seconds=61)
    assert json.dumps([request.id, request.argsrepr, request.kwargsrepr, request.delivery_info, request.correlation_id])
    received.decode()
    return request


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**18) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *((name,) for name in ("body", "content-encoding", "content-type", "headers", "properties", "redelivered")),
    *(("headers", name) for name in (
        "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id",
        "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers",
        "stamps", "compression", "halp_passed", "redelivered")),
    *(("properties", name) for name in (
        "correlation_id", "reply_to", "delivery_mode", "delivery_info", "priority", "body_encoding", "delivery_tag",
        "expiration")),
    *(("properties", "delivery_info", name) for name in ("exchange", "routing_key", "redelivered")),
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), values), min_size=1, max_size=3), st.sampled_from([LANE, COLLECT]))
def test_any_value_in_any_field(changes: list[tuple[tuple[str, ...], Any]], queue: str) -> None:
    altered = copy.deepcopy(message())
    for (*way, last), value in changes:
        place = altered
        for step in way:
            place = place[step] if isinstance(place, dict) and isinstance(place.get(step), dict) else {}
        place[last] = value
    try:
        taken = read(json.dumps(altered).encode(), queue)
    except NotOursError:
        return
    assert as_celery_reads_it(taken).kwargs == GOOD


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "more"]), values))
def test_any_value_in_any_argument(arguments: dict[str, Any]) -> None:
    given_ = GOOD | arguments
    try:
        taken = read(json.dumps(message(given_)).encode(), LANE)
    except NotOursError:
        return
    assert as_celery_reads_it(taken).kwargs == given_


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_anything_at_all_is_no_message(data: bytes) -> None:
    for queue in (LANE, COLLECT, MAILBOX, "celeryev.1", "1.reply.celery.pidbox"):
        with pytest.raises(NotOursError):
            read(data, queue)


def test_what_has_no_end_is_not_decoded() -> None:
    for data in (b"x" * (MAX_MESSAGE + 1), b"[" * 100_000):
        with pytest.raises(NotOursError):
            read(data, LANE)


def test_a_retried_question_keeps_what_it_is() -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
    taken = remake(message(headers={"retries": 3, "eta": soon, "halp_passed": 2, "stamped_headers": []}), LANE)
    request = as_celery_reads_it(taken)
    assert request.request_dict["retries"] == 3
    assert request.request_dict["halp_passed"] == 2
    assert request.eta == datetime.fromisoformat(soon)
    assert taken["properties"]["delivery_info"]["routing_key"] == LANE


def test_a_machine_whose_clock_is_ahead_makes_nobody_wait_longer() -> None:
    ahead = datetime.now(UTC) + timedelta(minutes=30)
    eta = remake(message(headers={"eta": ahead.isoformat()}), LANE)["headers"]["eta"]
    assert datetime.fromisoformat(eta) < datetime.now(UTC) + timedelta(seconds=61)
    past = datetime.now(UTC) - timedelta(days=1)
    assert remake(message(headers={"eta": past.isoformat()}), LANE)["headers"]["eta"] is None


@pytest.mark.parametrize("method", ["ping", "stats", "conf", "active"])
def test_what_flower_asks_is_answered(method: str) -> None:
    taken = json.loads(base64.b64decode(remake(control(method, arguments={"with_defaults": True}), MAILBOX)["body"]))
    assert taken["method"] == method
    assert taken["arguments"] == ({"safe": True} if method == "active" else {})


@pytest.mark.parametrize(
    "asked",
    [
        *map(control, ["shutdown", "pool_grow", "pool_shrink", "pool_restart", "rate_limit", "time_limit", "revoke",
                       "terminate", "autoscale", "add_consumer", "cancel_consumer", "enable_events", "disable_events",
                       "hello", "election", "memdump", "objgraph", "__class__", 5, None, ["ping"]]),
        control(reply_to={"exchange": "halp.x.000", "routing_key": "halp.x.000"}),
        control(reply_to=5),
        control(destination="all"),
        control(pattern="(a+)+$", matcher="pcre"),
        control(ticket=5),
    ],
)  # fmt: skip
def test_what_would_change_a_worker_is_not_obeyed(asked: dict[str, Any]) -> None:
    with pytest.raises(NotOursError):
        remake(asked, MAILBOX)
