"""Child processes that run `workers` commands: started, asked to end, ended; none outlives this process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from storage.command_line import child_environment
from workers.process.parent import PARENT_VARIABLE


def on_gpu(name: str, gpu: str) -> str:
    """Return a worker's name on a GPU, which files are called after: CUDA calls a share of one `MIG-GPU-…/1/0`."""
    return f"{name}-gpu{re.sub(r'[^A-Za-z0-9._-]', '-', gpu)}"


class Child:
    """One `workers` process with a name. Start it from a thread that lasts: the kernel ties its life to that thread."""

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.deaths = 0  # in a row, as its supervisor counts them
        self._command = [sys.executable, "-P", "-m", "workers.cli", *arguments]
        self._environment = {**child_environment(environment), PARENT_VARIABLE: str(os.getpid())}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the process, or start it again; both of its outputs go to `output`."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self._environment,
            start_new_session=True,  # Ctrl-C is for the supervisor, which then ends them in order
        )  # fmt: skip
        return self._process

    def exit_code(self) -> int | None:
        """Return how the process ended; None while it lives, or was never started."""
        return self._process.poll() if self._process is not None else None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def ask_to_end(self) -> None:
        """Send SIGTERM: a worker finishes what it has taken."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Take the process, which has ended, for one that was never started."""
        self._process = None

    def end(self, deadline: float) -> None:
        """Wait until a moment of `time.monotonic`, then end the process at once."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
