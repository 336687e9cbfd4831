"""The Celery app and its configuration: what everything that sends a message needs.

The settings were measured; those that differ from Celery's defaults say why. A worker's own parts are added in celery.py.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP, Queues
from kombu.transport import TRANSPORT_ALIASES

from storage.naming import model_slug
from workers.checkpoint.identity import checkpoint_digest, former_digest
from workers.queue.broker import tls
from workers.queue.queues import COLLECT, ModelQueues
from workers.settings import WorkerSettings, settings

logger = logging.getLogger(__name__)
_OTHER_BROKERS = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL")


def model_queues(config: WorkerSettings) -> ModelQueues:
    """Return the queues of the model that this process is configured for. Raises UserError."""
    return ModelQueues(model_slug(config.model), config.dtype, checkpoint_digest(config.model, config.revision))


def served_queues(config: WorkerSettings) -> tuple[ModelQueues, ...]:
    """Return the model's queues, and those by which an earlier version's runs know it, if they differ. Raises UserError."""
    ours = model_queues(config)
    former = replace(ours, digest=former_digest(config.model, config.revision))
    return (ours,) if former == ours else (ours, former)


def _configuration(config: WorkerSettings) -> dict[str, Any]:
    return {
        "broker_url": config.broker,
        "broker_use_ssl": tls(config.broker, config.broker_ca),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a broker that is away for an hour costs an hour, not the worker
        "broker_transport_options": {
            # Each consumer of one Redis database sweeps the shared index of unacknowledged messages with its own value.
            "visibility_timeout": config.visibility_timeout,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,  # else the sweep comes only every 100 s
            "socket_timeout": 60,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "queue_order_strategy": "workers.queue.queues:Rounds",
            "priority_steps": [0],  # one Redis key per lane instead of four
        },
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_acks_on_timeout": True,
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        "task_ignore_result": True,  # results are files
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_create_missing_queues": False,
        "task_default_queue": COLLECT,
        "worker_send_task_events": True,  # Flower
        "task_send_sent_event": False,
        "worker_eta_task_limit": 256,
        "worker_disable_rate_limits": True,
        "worker_hijack_root_logger": True,
        "imports": ["workers.tasks"],
    }


class _Queues(Queues):  # type: ignore[misc]
    """Celery's table of queues, in which `PREFIX.*` is all of a model's: a log that lists 129 names is not read."""

    def select(self, include: Sequence[str] | None) -> None:
        """Consume from these queues, a model's in the order in which they were declared."""
        super().select([name for wanted in include or () for name in self._meant(wanted)])

    def format(self, indent: int = 0, indent_first: bool = True) -> str:
        """Return the queues that are consumed from, for a worker's banner."""
        numbers = Counter(f"{name.rpartition('.')[0]}.*" if name != COLLECT else name for name in self.consume_from)
        lines = [f".> {name} ({number} queues)" if number > 1 else f".> {name}" for name, number in numbers.items()]
        text = ("\n" + " " * indent).join(lines)
        return " " * indent + text if indent_first else text

    def _meant(self, wanted: str) -> list[str]:
        return [name for name in self if name.startswith(wanted[:-1])] if wanted.endswith(".*") else [wanted]


class _AMQP(AMQP):  # type: ignore[misc]
    queues_cls = _Queues


def _drop_other_brokers() -> None:
    """Leave out what Celery would take before our own setting: its messages would be in one server, our notes in another.

    `celery -b` and BROKER_URL arrive here as CELERY_BROKER_URL.
    """
    for name in _OTHER_BROKERS:
        if os.environ.pop(name, None) is not None:
            logger.warning("%s is not heeded: name the broker by HALP_BROKER_URL", name)


# `broker_transport` would be overruled by `redis+socket://`, and would show in every printed URL.
_drop_other_brokers()
TRANSPORT_ALIASES.update(redis="workers.queue.transport:Transport", rediss="workers.queue.transport:Transport")
app = Celery("workers", amqp=_AMQP)
app.conf.update(_configuration(settings()))
