"""Kombu's Redis transport, with a look at whatever comes out of Redis before kombu and Celery get it.

Whoever can write to Redis could else end a worker with one element of a list, one published word or one key of another type:
each raises in kombu's event loop, which is the worker's. Here what is no message of ours is dropped with one line in the log,
and a key that is not ours is named and gone around.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from queue import Empty
from typing import Any

from kombu.exceptions import BatchPublishError
from kombu.transport import redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps
from kombu.utils.url import parse_url
from redis.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError as BrokerLostError
from redis.exceptions import OutOfMemoryError, ResponseError

from workers.broker_url import read_broker_url
from workers.queue.broker import trouble
from workers.queue.envelope import NotOursError, read
from workers.queue.foreign import (
    UNACKED,
    UNACKED_INDEX,
    ForeignKeys,
    foreign_lists,
    foreign_notes,
    is_wrong_type,
    type_of,
)
from workers.queue.queues import COLLECT, OURS, instead_of
from workers.queue.unacked import QoS
from workers.settings import settings

logger = logging.getLogger(__name__)
_PAUSE = 2.0  # seconds
_REPLIES = "reply.celery.pidbox"


class TLSConnection(SSLConnection):
    """A connection whose TLS handshake takes no longer than connecting may: a server without TLS never answers one."""

    def _wrap_socket_with_ssl(self, sock: Any) -> Any:
        sock.settimeout(self.socket_connect_timeout)
        try:
            wrapped = super()._wrap_socket_with_ssl(sock)  # type: ignore[no-untyped-call]
        except TimeoutError as error:
            raise BrokerLostError("no answer to the TLS handshake") from error
        wrapped.settimeout(self.socket_timeout)
        return wrapped


class FollowingConnection(Connection):
    """A connection to the server that HALP_BROKER_URL_FILE names now; without that, to the one that it is made for."""

    def _connect(self) -> Any:
        path = settings().broker_url_file
        if path is not None:
            try:
                now = parse_url(read_broker_url(path))
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise BrokerLostError(f"HALP_BROKER_URL_FILE={path}: {why}") from None
            self.host, self.port, self.db = now["hostname"], now["port"] or self.port, int(now["virtual_host"] or 0)
            self.username, self.password = now["userid"], now["password"]
        return super()._connect()  # type: ignore[no-untyped-call]


class Channel(redis.Channel):  # type: ignore[misc]
    """A channel that outlives what is no message, keys of another type, and a connection lost before it is closed."""

    QoS = QoS
    connection_class = FollowingConnection
    connection_class_ssl = TLSConnection
    _kept: Any = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._foreign = ForeignKeys()
        super().__init__(*arguments, **options)

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

    # What comes in

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self._foreign and self._foreign.forget_old():
            self._update_queue_cycle()
        super()._brpop_start(timeout)

    def _update_queue_cycle(self) -> None:
        self._queue_cycle.update([queue for queue in self.active_queues if queue not in self._foreign])

    def _brpop_read(self, **options: Any) -> bool:
        try:
            return self._take(**options)
        except OutOfMemoryError as error:
            # Redis gave the question and then had no room to note that this worker has it. Escaping, this would end the
            # worker. Waiting, it loses one question each pause, which feeding brings back.
            logger.error("the broker %s", trouble(error))
            time.sleep(_PAUSE)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _take(self, **options: Any) -> bool:
        """Deliver what a queue has given, as bytes: kombu would decode it first, however large it is."""
        try:
            found = self.client.parse_response(self.client.connection, "BRPOP", **options)
        except self.connection_errors:
            self.client.connection.disconnect()  # the next iteration connects again
            raise
        except ResponseError as error:
            # One foreign key stands before all queues that come after it.
            self._go_around(error, foreign_lists(self._create_client(), self._queue_cycle.items))
            return True
        if not found:
            raise Empty
        queue = bytes_to_str(found[0])
        self._queue_cycle.rotate(queue)
        self.connection._deliver(found[1], queue)
        return True

    def _receive_one(self, client: Any) -> bool | None:
        """Deliver what was published, as bytes."""
        try:
            response = client.parse_response()
        except self.connection_errors:
            self._in_listen = None
            raise
        if not isinstance(response, list | tuple):
            return None
        said = self._handle_message(client, response)
        if not bytes_to_str(said["type"]).endswith("message"):
            return None
        topic = said["channel"].decode(errors="replace")  # /0.celeryev/worker.heartbeat
        queue = self._fanout_to_queue.get(topic.partition(".")[2].partition("/")[0])
        if queue is None:
            return None
        self.connection._deliver(said["data"], queue)
        return True

    # What goes out, and the keys that it goes by

    def around(self, queue: str) -> str:
        """Return a queue, or another one where that is known to be a foreign key."""
        if queue not in self._foreign:
            return queue
        return next((other for other in instead_of(queue) if other not in self._foreign), queue)

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        if options.get("_publish_batch") is not None:
            super()._put(queue, message, **options)
        elif queue.startswith(OURS):
            self.push(queue, dumps(message))
        else:
            try:
                super()._put(queue, message, **options)
            except ResponseError as error:
                self._go_around(error, [queue])

    def push(self, queue: str, data: str) -> None:
        """Put a message into a queue, or into another where that is a foreign key. A hint to the collector may be lost."""
        client = self._create_client()
        for place in (queue, *instead_of(queue)):
            if place in self._foreign:
                continue
            try:
                client.lpush(place, data)
            except ResponseError as error:
                self._go_around(error, [place])
            else:
                return
        if queue != COLLECT:
            raise ResponseError(f"WRONGTYPE {queue}, and all that could stand for it, are no lists")

    def create_publish_batch(self, max_size: int) -> _Batch:
        """Return kombu's batch of messages, for which foreign keys are gone around too."""
        return _Batch(self, max_size)

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> Any:
        """Return the queues of an exchange: each of ours has its queue's name, whatever the bindings in Redis say."""
        return [exchange] if exchange.startswith(OURS) else super()._lookup(exchange, routing_key, default)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: Any, queue: str) -> None:
        if exchange.startswith(OURS):
            return
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except ResponseError as error:
            self._go_around(error, [self.keyprefix_queue % exchange])

    def get_table(self, exchange: str) -> list[tuple[str, ...]]:
        """Return an exchange's bindings; of answers' only those that lead to where answers go."""
        key = self.keyprefix_queue % exchange
        try:
            found = self._create_client().smembers(key)
        except ResponseError as error:
            self._go_around(error, [key])
            return []
        table = [tuple(binding.decode(errors="replace").split(self.sep)) for binding in found]
        ends = f".{_REPLIES}" if exchange == _REPLIES else ""
        return [binding for binding in table if len(binding) == 3 and binding[2].endswith(ends)]

    def _size(self, queue: str) -> int:
        try:
            return int(super()._size(queue))
        except ResponseError as error:
            self._go_around(error, [queue])
            return 0

    def _delete(self, queue: str, *arguments: Any, **options: Any) -> None:
        try:
            super()._delete(queue, *arguments, **options)
        except ResponseError as error:
            self._go_around(error, [queue])

    def maybe_refresh_binding_expiry(self) -> None:
        """Keep the bindings of queues that end by themselves; a mailbox works without."""
        try:
            super().maybe_refresh_binding_expiry()
        except ResponseError as error:
            self._binding_expiry_refreshed_at = self._bindings_swept_at = time.monotonic()
            kinds = {self.keyprefix_queue % exchange: "set" for exchange, _ in self._fanout_queues.values()}
            kinds[self.keyprefix_binding_deadlines] = "zset"
            client = self._create_client()
            self._go_around(error, [name for name in kinds if type_of(client, name) not in ("none", kinds[name])])

    def go_around_notes(self, error: ResponseError) -> None:
        """Name the foreign keys where notes on messages should be. Raises an error of another kind."""
        known = UNACKED in self._foreign or UNACKED_INDEX in self._foreign
        self._go_around(error, () if known else foreign_notes(self._create_client()))

    def _go_around(self, error: ResponseError, names: Iterable[str]) -> None:
        """Name foreign keys, if that is what Redis complains of, and do without them for a while. Raises another error."""
        if not is_wrong_type(error):
            raise error
        for name in names:
            self._foreign.meet(name, self._create_client())
        self._update_queue_cycle()


class _Batch(redis.PublishBatch):  # type: ignore[misc]
    """Messages in one round trip. Those to a foreign key go elsewhere; all others have arrived."""

    def flush(self) -> None:
        """Send what waits."""
        commands = [words for words, _ in self.pipeline.command_stack]
        try:
            super().flush()
        except BatchPublishError as error:
            if error.__cause__ is None or not is_wrong_type(error.__cause__):
                raise
            foreign = foreign_lists(self.pipeline, {words[1] for words in commands})
            for _, queue, data in commands:
                if queue in foreign:
                    self.channel.push(queue, data)
            self._failed = None


class Transport(redis.Transport):  # type: ignore[misc]
    """The transport of `redis://` and `rediss://` in our processes."""

    Channel = Channel

    def _deliver(self, data: bytes, queue: str) -> None:
        try:
            message = read(data, queue)
        except NotOursError as error:
            logger.error("dropping a message from %s: %s", queue, error)
            return
        super()._deliver(message, queue)
