"""Names of queues: 128 lanes and a retry queue per model, and the collector's queue.

The questions of one image share a lane, and each worker goes round the lanes in an order of its own, so that several workers
do not scatter an image's questions among them. The name carries all that a preloaded model is: a worker that serves a queue
can compute everything in it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from kombu import Exchange, Queue
from kombu.utils.scheduling import round_robin_cycle

# Of eight workers (6 questions an image, 5,400 questions): 16 lanes in rotation keep 2.5 questions together, 64 in random
# orders 5.2 to 5.7, 128 keep 5.7, 256 keep 5.8. Each worker waits on all of them in one BRPOP.
LANES = 128
OURS = "halp."  # what the name of each queue begins with
COLLECT = "halp.collect"
EXTRACT = "workers.extract"  # the task whose messages are in a model's queues
_VISIT = 256  # messages that a worker takes from a lane before it looks into the next


@lru_cache(maxsize=4096)  # a feeder names one for each message
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
        return f"{self.prefix}.retry"

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes."""
        return tuple(f"{self.prefix}.{lane:03d}" for lane in range(LANES))

    def lane(self, run_id: str, key: str) -> str:
        """Return the lane of the questions in a run that have one `lane_key`: those of an image."""
        number = int.from_bytes(hashlib.sha256(f"{run_id}\0{key}".encode()).digest()[:4]) % LANES
        return f"{self.prefix}.{number:03d}"

    def in_order_of(self, worker: str) -> tuple[str, ...]:
        """Return the queues as a worker serves them: retries, then the lanes, in a random order of its own."""
        return (self.retry, *random.Random(worker).sample(self.lanes, LANES))

    @property
    def prefix(self) -> str:
        """What the names of these queues begin with."""
        return f"halp.{self.slug}.{self.dtype}.{self.digest}"


def instead_of(queue: str) -> Iterator[str]:
    """Yield the queues that serve in place of one that is not usable: that for retries, then any lane. None for a hint's."""
    if queue.startswith(OURS) and queue != COLLECT:
        prefix = queue.rpartition(".")[0]
        yield from (f"{prefix}.retry", *(f"{prefix}.{lane:03d}" for lane in range(LANES)))


class Rounds(round_robin_cycle):  # type: ignore[misc]
    """The order in which a worker looks into its queues: retries first, then round the lanes, each until it is empty.

    It goes on from the lane that it is in. With kombu's `priority`, which begins at the first lane each time, a long run that
    is fed all the while would keep a worker in its first lanes, and whatever lay in its last ones would wait for days.
    """

    _lane = ""
    _taken = 0

    def consume(self, n: int) -> list[str]:
        """Return all queues, in the order that Redis is to look into them."""
        lanes = [name for name in self.items if _is_lane(name)]
        others = [name for name in self.items if not _is_lane(name)]
        here = lanes.index(self._lane) if self._lane in lanes else 0
        if self._taken >= _VISIT:
            here += 1
        return [*others, *lanes[here:], *lanes[:here]]

    def rotate(self, last_used: str) -> str:
        """Note the queue that gave a message."""
        if _is_lane(last_used):
            again = last_used == self._lane and self._taken < _VISIT
            self._lane, self._taken = last_used, self._taken + 1 if again else 1
        return last_used


def _is_lane(name: str) -> bool:
    return name.rpartition(".")[2].isdecimal()
