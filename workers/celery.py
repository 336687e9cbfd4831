"""The entry of a worker: `celery -A workers …` finds the app here, with what a worker starts besides Celery."""

from __future__ import annotations

from typing import Any

from billiard import einfo
from celery.signals import celeryd_init

from storage.screen.terminal import guard_logs
from workers.bootsteps import CollectorStep, EngineStep, PresenceStep
from workers.monitor.metrics import MetricsStep
from workers.queue.app import app, served_queues
from workers.queue.queues import declaration
from workers.settings import settings


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
    for queues in served_queues(settings()):
        for name in queues.in_order_of(sender):
            app.amqp.queues.select_add(declaration(name))
