"""The Celery app. `celery -A workers …` finds it here.

The settings were measured; those that differ from Celery's defaults say why.
"""

from __future__ import annotations

from typing import Any

from billiard import einfo
from celery import Celery
from celery.signals import celeryd_init
from kombu.transport import TRANSPORT_ALIASES

from storage.naming import model_slug
from storage.screen.terminal import guard_logs
from workers.bootsteps import CollectorStep, EngineStep, PresenceStep
from workers.checkpoint.identity import checkpoint_digest
from workers.monitor.metrics import MetricsStep
from workers.queue.broker import tls
from workers.queue.queues import COLLECT, ModelQueues, declaration
from workers.settings import WorkerSettings, settings


def model_queues(config: WorkerSettings) -> ModelQueues:
    """Return the queues of the model that this process is configured for. Raises UserError."""
    return ModelQueues(model_slug(config.model), config.dtype, checkpoint_digest(config.model, config.revision))


def _configuration(config: WorkerSettings) -> dict[str, Any]:
    return {
        "broker_url": config.broker_url,
        "broker_use_ssl": tls(config.broker_url, config.broker_ca),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a broker that is away for an hour costs an hour, not the worker
        "broker_transport_options": {
            # Each consumer of one Redis database sweeps the shared index of unacknowledged messages with its own value.
            "visibility_timeout": config.visibility_timeout,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,  # else the sweep comes only every 100 s
            "socket_timeout": 60,
            "socket_connect_timeout": 10,
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


class _Code(einfo._Code):  # type: ignore[misc]
    """What Celery keeps of a failed task's code, without the positions of all its instructions.

    They are 300 KB a failure at least, in reference cycles that Python collects late: after some hundred retries a worker held
    50 MB of them. https://github.com/celery/celery/issues/8882. Lines are still known; the record's text was made before.
    """

    def __init__(self, code: Any) -> None:
        super().__init__(code)
        self._co_positions = [(None, None, None, None)] * len(self._co_positions)  # type: ignore[has-type]


einfo._Frame.Code = _Code
guard_logs()  # here, where every worker passes, also one of plain `celery -A workers`
# `broker_transport` would be overruled by `redis+socket://`, and would show in every printed URL.
TRANSPORT_ALIASES.update(redis="workers.queue.transport:Transport", rediss="workers.queue.transport:Transport")
app = Celery("workers")
app.conf.update(_configuration(settings()))
app.steps["worker"].update({PresenceStep, EngineStep, CollectorStep, MetricsStep})


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _declare_queues(sender: str, **_: Any) -> None:
    """Declare the queues when a worker starts, in its own order: naming a local model's queues reads its files.

    Workers do not talk to each other, also where one is started without `--without-gossip --without-mingle`: what they
    believe of what others publish, anybody could have published.
    """
    from celery.worker.consumer.gossip import Gossip  # half a second that no command line needs
    from celery.worker.consumer.mingle import Mingle

    Gossip.compatible_transports = Mingle.compatible_transports = frozenset()
    for name in model_queues(settings()).in_order_of(sender):
        app.amqp.queues.select_add(declaration(name))
