"""Names of queues: sixteen lanes and a retry queue per model, and the collector's queue.

The questions of one image share a lane, and each worker serves the lanes in an order of its own, so that several workers do
not scatter an image's questions among them. The name carries all that a preloaded model is: a worker that serves a queue
can compute everything in it.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from kombu import Exchange, Queue

LANES = 16
COLLECT = "halp.collect"


def declaration(name: str) -> Queue:
    """Return a queue as Celery declares it: bound to an exchange of its own, or it would share the default queue's."""
    return Queue(name, exchange=Exchange(name, type="direct"), routing_key=name)


@dataclass(frozen=True, slots=True)
class ModelQueues:
    """The queues of one model, dtype and checkpoint."""

    slug: str
    dtype: str
    digest: str

    @property
    def retry(self) -> str:
        """The queue of questions that are tried again: served first."""
        return f"{self._prefix}.retry"

    @property
    def lanes(self) -> tuple[str, ...]:
        """The sixteen lanes."""
        return tuple(f"{self._prefix}.{lane:02d}" for lane in range(LANES))

    def lane(self, run_id: str, image_id: str) -> str:
        """Return the lane of an image's questions in a run."""
        return self.lanes[int.from_bytes(hashlib.sha256(f"{run_id}\0{image_id}".encode()).digest()[:4]) % LANES]

    def in_order_of(self, worker: str) -> tuple[str, ...]:
        """Return the queues as a worker serves them: retries, then the lanes, beginning at one of its own."""
        start = random.Random(worker).randrange(LANES)
        return (self.retry, *self.lanes[start:], *self.lanes[:start])

    @property
    def _prefix(self) -> str:
        return f"halp.{self.slug}.{self.dtype}.{self.digest}"
