"""One worker per GPU of this machine: each restarted when it dies, all of them drained by one signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import IO

from storage.screen.terminal import echo
from workers.process.children import Child, on_gpu
from workers.settings import settings

_POLL = 0.2
_SETTLED = 60.0  # seconds of life after which a death is the first in a row again
_LONGEST_PAUSE = 60.0
_MAX_DEATHS = 5  # in a row: then that GPU is given up


def run_workers(gpus: Sequence[str], arguments: Sequence[str]) -> int:
    """Run `workers extract` with these arguments on each GPU until SIGTERM or Ctrl-C; a second signal kills them.

    Metrics are served on a port each, from HALP_METRICS_PORT on.
    Return 0 after a drain, and 1 once every GPU has been given up. Their lines go to stderr behind `gpu0 |`.
    """
    port = settings().metrics_port
    ports = [{"HALP_METRICS_PORT": str(port + i)} if port else {} for i in range(len(gpus))]
    workers = [_Worker(gpu, arguments, own) for gpu, own in zip(gpus, ports)]
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: signals.append(received))
    while not signals:
        for worker in workers:
            worker.look()
        if all(worker.given_up for worker in workers):
            _say("every worker has been given up")
            return 1
        time.sleep(_POLL)
    _say(f"ending {sum(worker.child.alive for worker in workers)} workers when they have finished what they took")
    for worker in workers:
        worker.child.ask_to_end()
    while any(worker.child.alive for worker in workers):
        if len(signals) > 1:
            for worker in workers:
                worker.child.kill()
        time.sleep(_POLL)
    for worker in workers:
        worker.wait_for_output()
    return 0


class _Worker:
    """The worker of one GPU, and when it is started next."""

    def __init__(self, gpu: str, arguments: Sequence[str], metrics: dict[str, str]) -> None:
        name = on_gpu(f"extract-{os.getpid()}", gpu)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, **metrics}
        self.child = Child(f"gpu{gpu}", ["extract", "--name", name, *arguments], environment)
        self.given_up = False
        self._begun = 0.0
        self._next_start: float | None = time.monotonic()
        self._reader: threading.Thread | None = None

    def look(self) -> None:
        """Start the worker when it is time; note a death and choose the next time."""
        now = time.monotonic()
        if self._next_start is not None:
            if now >= self._next_start:
                self._start(now)
        elif not self.given_up and (code := self.child.exit_code()) is not None:
            self._after_death(now, code)

    def wait_for_output(self) -> None:
        """Wait until the last line is printed."""
        if self._reader is not None:
            self._reader.join(10)

    def _start(self, now: float) -> None:
        read, write = os.pipe()
        with os.fdopen(write, "wb") as output:
            self.child.start(output)
        lines = os.fdopen(read, encoding="utf-8", errors="surrogateescape")  # a bar's carriage returns end lines too
        self._reader = threading.Thread(target=_print_lines, args=(self.child.name, lines), daemon=True)
        self._reader.start()
        self._begun, self._next_start = now, None

    def _after_death(self, now: float, code: int) -> None:
        self.child.deaths = 1 if now - self._begun > _SETTLED else self.child.deaths + 1
        ended = f"{self.child.name} ended with {code}"
        if self.child.deaths >= _MAX_DEATHS:
            self.given_up = True
            _say(f"{ended}, {self.child.deaths} times in a row: given up. Its last lines say why")
            return
        pause = min(_LONGEST_PAUSE, 2.0 ** (self.child.deaths - 1))
        _say(f"{ended}; starting it again in {pause:g} s")
        self._next_start = now + pause


def _print_lines(name: str, lines: IO[str]) -> None:
    with lines:
        for line in lines:
            echo(f"{name} | {line.rstrip()}", err=True)


def _say(text: str) -> None:
    echo(f"workers | {text}", err=True)
