"""What a worker has taken and not acknowledged, as kombu notes it in Redis; what is there and no note of ours does no harm."""

from __future__ import annotations

import json
import logging
import random
import time
from typing import TYPE_CHECKING, Any

from kombu.transport import redis
from kombu.transport.virtual import QoS as VirtualQoS
from redis.exceptions import LockNotOwnedError, ResponseError

from workers.queue.broker import trouble
from workers.queue.envelope import MAX_MESSAGE, NotOursError, decode, remake
from workers.queue.foreign import is_strange_lock
from workers.queue.queues import OURS

if TYPE_CHECKING:
    from workers.queue.transport import Channel

logger = logging.getLogger(__name__)
_MOST = 10_000  # overdue messages that one sweep looks at
_SECONDS = 2.0  # that it takes at most: it holds up the worker's event loop


class QoS(redis.QoS):  # type: ignore[misc]
    """Kombu's notes. Where they cannot be kept, a worker works without: what it loses, feeding brings back."""

    channel: Channel

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note that this worker has a message."""
        try:
            super().append(message, delivery_tag)
        except ResponseError as error:
            self.channel.go_around_notes(error)
            VirtualQoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Remove a message's note: it is done."""
        try:
            super().ack(delivery_tag)
        except ResponseError as error:
            self.channel.go_around_notes(error)
            VirtualQoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Remove a message's note, and give the message back where that is wanted."""
        try:
            super().reject(delivery_tag, requeue)
        except ResponseError as error:
            self.channel.go_around_notes(error)
            VirtualQoS.ack(self, delivery_tag)

    def restore_visible(self, start: int = 0, num: int | None = None, interval: int = 1) -> None:
        """Give back what was taken longer ago than the visibility timeout: its worker is dead."""
        with self.channel.conn_or_acquire() as client:
            lock = client.lock(self.unacked_mutex_key, timeout=self.unacked_mutex_expire)
            locked = lock.acquire(blocking=False)
            # A stranger's lock is no reason to wait: two sweeps at once do no harm, they only take longer.
            if not locked and not is_strange_lock(client, self.unacked_mutex_key, self.unacked_mutex_expire):
                return
            try:
                self._sweep(client)
            except ResponseError as error:
                self.channel.go_around_notes(error)
            finally:
                if locked:
                    try:
                        lock.release()
                    except LockNotOwnedError:
                        logger.debug("the sweep took longer than its lock")

    def _sweep(self, client: Any) -> None:
        ceiling = time.time() - self.visibility_timeout
        tags = client.zrange(self.unacked_index_key, ceiling, 0, desc=True, byscore=True, offset=0, num=_MOST)
        random.shuffle(tags)  # what cannot be given back must not stand before the others for good
        ends = time.monotonic() + _SECONDS
        for tag in tags:
            try:
                self.restore_by_tag(tag, client)
            except ResponseError as error:
                logger.error("cannot give back a message: the broker %s", trouble(error))
            if time.monotonic() > ends:
                break

    def restore_by_tag(self, tag: str | bytes, client: Any = None, leftmost: bool = False) -> None:
        """Give one message back."""

        def give_back(pipe: Any) -> None:
            noted = pipe.hget(self.unacked_key, tag)
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            if noted:
                self._requeue(noted, pipe, leftmost)

        with self.channel.conn_or_acquire(client) as connected:
            try:
                connected.transaction(give_back, self.unacked_key)
            except ResponseError as error:
                self.channel.go_around_notes(error)
                if (held := self._delivered.get(tag)) is not None:
                    self.channel.push(held.delivery_info["routing_key"], json.dumps(held._raw))

    def _requeue(self, noted: bytes, pipe: Any, leftmost: bool) -> None:
        """Put back what a note says, if it is a message: ours is made anew, another program's stays as it is."""
        try:
            match decode(noted, 2 * MAX_MESSAGE):
                case [message, str(), str() as queue] if queue.startswith(OURS):
                    whole = remake(message, queue)
                    whole["headers"]["redelivered"] = True
                    push = pipe.lpush if leftmost else pipe.rpush
                    push(self.channel.around(queue), json.dumps(whole))
                case [
                    {"headers": dict(), "properties": {"delivery_info": dict()}} as message,
                    str() as exchange,
                    str() as queue,
                ]:
                    self.channel._do_restore_message(message, exchange, queue, pipe, leftmost)
                case _:
                    raise NotOursError("it is no message with its queue")
        except NotOursError as error:
            logger.error("dropping what a worker seemed to have taken: %s", error)
