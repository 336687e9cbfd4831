"""Reports of finished runs, written one at a time behind the collector's back: no run waits for another's report.

A process of its own writes them, at the lowest priority: a run's end needs its report in no way, and a stranger's images are
decoded for it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress

from workers.process.parent import PARENT_VARIABLE, die_with_named_parent

logger = logging.getLogger(__name__)
_SECONDS = 120.0  # for one report
_IDLE = 10.0  # seconds without a report after which the process is ended
_LAST_SECONDS = 15.0  # for the reports that wait when this process is asked to end
_NICENESS = 15


class Reporter:
    """Writes the reports of the runs that are named to it, in turn."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writer: subprocess.Popen[str] | None = None
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._serve, name="reports", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def add(self, location: str) -> None:
        """Have the report of a run written soon."""
        self._waiting.put(location)

    def close(self) -> None:
        """Write what waits, as far as there is time, and end."""
        self._deadline = time.monotonic() + _LAST_SECONDS
        self._waiting.put(None)
        self._thread.join(_SECONDS + _LAST_SECONDS)
        self._end_writer()

    def _serve(self) -> None:
        while True:
            try:
                location = self._waiting.get(timeout=_IDLE)
            except queue.Empty:
                self._end_writer()
                continue
            if location is None:
                return
            if time.monotonic() > self._deadline:
                logger.warning("%s: no report.html: this collector ended. `storage report` writes it", location)
                continue
            if problem := self._write(location):
                logger.warning("%s: no report.html: %s", location, problem)

    def _write(self, location: str) -> str:
        """Write one report; return what went wrong, if anything did."""
        try:
            if self._writer is None:
                self._writer = self._start_writer()
            assert self._writer.stdin is not None
            assert self._writer.stdout is not None
            self._writer.stdin.write(json.dumps(location) + "\n")
            self._writer.stdin.flush()
            if not select.select([self._writer.stdout], [], [], _SECONDS)[0]:
                self._end_writer()
                return f"it took more than {_SECONDS:.0f} s"
            if answer := self._writer.stdout.readline():
                return str(json.loads(answer))
        except Exception as error:  # noqa: BLE001  (whatever it is, the other reports are written)
            self._end_writer()
            return f"{type(error).__name__}: {error}"
        self._end_writer()
        return "the process that wrote it died"

    @staticmethod
    def _start_writer() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "workers.collect.reporter"],
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )

    def _end_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.kill()
            writer.wait()
            for pipe in (writer.stdin, writer.stdout):
                with suppress(OSError):  # what it did not read
                    pipe.close()  # type: ignore[union-attr]


def main() -> None:
    """Write the report of each run that a line of stdin names; answer each with what went wrong."""
    die_with_named_parent()
    os.nice(_NICENESS)
    from storage.runs.run import Run
    from storage.screen.terminal import echo_json
    from storage.views.report import write_report

    for line in sys.stdin:
        problem = ""
        try:
            write_report(Run.open(json.loads(line)))
        except Exception as error:  # noqa: BLE001  (whatever it is, other runs have reports too)
            problem = f"{type(error).__name__}: {error}"
        echo_json(problem)


if __name__ == "__main__":
    main()
