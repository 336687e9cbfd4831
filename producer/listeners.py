"""Who serves a run's queues right now: asked of the broker, and never needed for the account."""

from __future__ import annotations

from dataclasses import dataclass

from storage.run import Run

_TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class Listeners:
    """Names of the workers that serve a run's model, and a sentence on what stalls the run, if anything does."""

    names: list[str]
    problem: str | None


def listening_workers(run: Run) -> Listeners:
    """Ask the workers what they serve, for about a second."""
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from workers.celery import app
    from workers.feed import queues_of
    from workers.queues import COLLECT

    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=_TIMEOUT)
            answers = app.control.inspect(timeout=_TIMEOUT, connection=connection).active_queues() or {}
            address = connection.as_uri()
    except (OperationalError, RedisError, OSError) as error:
        address = app.connection_for_write().as_uri()
        return Listeners([], f"The broker {address} does not answer ({error}); the account is from the files.")
    served = {worker: {queue["name"] for queue in queues} for worker, queues in answers.items()}
    wanted = set(queues_of(run).lanes)
    names = sorted(worker for worker, queues in served.items() if wanted <= queues)
    if not names:
        settings = run.settings
        command = f"workers extract --model {settings.model} --dtype {settings.dtype}"
        if settings.revision != "main":
            command += f" --revision {settings.revision}"
        return Listeners([], f"No worker at {address} serves this run's model. Start one: {command}")
    if not any(COLLECT in queues for queues in served.values()):
        return Listeners(names, f"No collector at {address} packs this run. Start one: workers collect {run.location}")
    return Listeners(names, None)
