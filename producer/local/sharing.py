"""Which machine serves a run that several share: the one that the newest note in `.run/servers` names.

Whoever finds that one gone serves the run itself and writes the next note. A number is taken by one machine alone (the store
creates an object once, also over a network), and who sees a newer note than its own stops serving. Two that serve at the
same time for a while do no harm but to compute twice: the truth is in the run's files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from types import TracebackType

from producer.local.server import EmbeddedServer, private_directory
from storage.errors import DamagedError, UserError
from storage.runs.run import Run
from storage.screen.terminal import echo
from storage.stores.handles import regular_file

NOTES = ".run/servers"
_LONGEST_NOTE = 1 << 16
_PING = 3.0  # seconds that a server has to answer
_GONE = 20.0  # seconds without an answer and without a sign in the note's time, after which somebody else serves
_UNREACHABLE = 180.0  # seconds without an answer, while the note shows that it is there
_SIOCGIFADDR = 0x8915  # netdevice(7)
_ELSEWHERE = (socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")  # in no network; nothing is sent there


class SharedServer:
    """The server of a run, as one of the machines that share it sees it, for the length of a `with` block.

    A file of this machine alone names it to the processes here.
    """

    def __init__(self, run: Run, addresses: Sequence[str] = ()) -> None:
        self.directory = private_directory()
        self._file = self.directory / "broker"
        self._run, self._addresses = run, addresses or own_addresses()
        self._own: EmbeddedServer | None = None
        self._number = 0  # of the newest note
        self._sign: object = None  # that the note has given last
        self._signed = self._answered = time.monotonic()

    @property
    def variables(self) -> dict[str, str]:
        """What names the server to this machine's processes."""
        return {"HALP_BROKER_URL_FILE": str(self._file)}

    def __enter__(self) -> SharedServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._own is not None:
            with suppress(OSError, DamagedError):
                self._run.store.put(_key(self._number), b"")  # others need not wait
            self._stop_serving()
        shutil.rmtree(self.directory, ignore_errors=True)

    def look(self) -> bool:
        """Serve, or follow who serves; return whether it is this machine. To be called every few seconds.

        Raises UserError where one serves that this machine cannot reach.
        """
        newest = max(_numbers(self._run), default=0)
        gone = newest == 0
        if self._own is not None:
            if newest == self._number and self._own.alive:
                with suppress(OSError):
                    os.utime(self._run.store.address(_key(self._number)))
                return True
            echo(f"{socket.gethostname()} no longer serves the run", err=True)
            gone = newest == self._number  # its server has died
            self._stop_serving()
        if gone or self._is_gone(newest):
            self._serve(newest + 1)
        return self._own is not None

    def _is_gone(self, number: int) -> bool:
        """Tell whether the machine of a note is gone; name its server to our processes where it answers."""
        now = time.monotonic()
        if number != self._number:
            self._number, self._sign, self._signed, self._answered = number, None, now, now
        urls: list[str] = []
        with suppress(OSError, DamagedError), regular_file(self._run.store.address(_key(number))) as (handle, status):
            # Of an opened file: a network file system may know the time of a path from a minute ago.
            urls = os.pread(handle, _LONGEST_NOTE, 0).decode("ascii", "replace").split()
            if not urls:
                return True  # it said so
            if (status.st_ino, status.st_mtime_ns) != self._sign:
                self._sign, self._signed = (status.st_ino, status.st_mtime_ns), now
        if url := next(filter(answers, urls), None):
            self._answered = time.monotonic()
            self._name(url)
            return False
        if now - self._answered > _UNREACHABLE and now - self._signed < _GONE:
            hosts = ", ".join(url.rpartition("@")[2] for url in urls)
            raise UserError(f"another machine serves the run at {hosts}, and cannot be reached from {socket.gethostname()}")
        return now - max(self._answered, self._signed) > _GONE

    def _serve(self, number: int) -> None:
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(self._addresses))
            if not self._write(number, "\n".join(server.urls)):
                return  # somebody else was faster; the next look finds them
            stack.pop_all()  # it serves on
        self._own, self._number = server, number
        self._name(server.urls[0])
        for older in _numbers(self._run):
            if older < number:
                self._run.store.delete(_key(older))
        echo(f"{socket.gethostname()} serves the run at {', '.join(url.rpartition('@')[2] for url in server.urls)}", err=True)

    def _stop_serving(self) -> None:
        if self._own is not None:
            self._own.__exit__(None, None, None)
            self._own = None

    def _write(self, number: int, text: str) -> bool:
        """Create a note that this user alone can read; return False where there is one."""
        with self._run.store.partial() as path:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            return self._run.store.publish(path, _key(number))

    def _name(self, url: str) -> None:
        partial = self._file.with_suffix(".partial")
        partial.write_text(url)
        partial.replace(self._file)


def serving(run: Run) -> str | None:
    """Return the URL of the server of a run that is shared; None where none answers."""
    for number in sorted(_numbers(run), reverse=True)[:1]:
        with suppress(OSError, DamagedError):
            urls = run.store.get(_key(number), _LONGEST_NOTE).decode("ascii", "replace").split()
            return next(filter(answers, urls), None)
    return None


def answers(url: str) -> bool:
    """Tell whether a server answers to a URL with its password."""
    from redis import Redis, RedisError

    try:
        with Redis.from_url(url, socket_connect_timeout=_PING, socket_timeout=_PING) as client:
            return bool(client.ping())
    except (RedisError, OSError, ValueError):
        return False


def own_addresses() -> list[str]:
    """Return this machine's addresses for others: of its name, and of its way out; else of all its networks; else its own."""
    for addresses in (_addresses(), _of_interfaces()):
        if found := [address for address in dict.fromkeys(addresses) if _is_usable(address)]:
            return found
    return ["127.0.0.1"]


def _addresses() -> Iterator[str]:
    with suppress(OSError):
        for *_, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            yield str(address[0])
    for family, far in _ELSEWHERE:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            yield str(probe.getsockname()[0])


def _of_interfaces() -> Iterator[str]:
    """Yield an IPv4 address of each network card: a compute node may have no way out, and a name that leads to itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                yield socket.inet_ntoa(fcntl.ioctl(asked, _SIOCGIFADDR, name.encode().ljust(256, b"\0"))[20:24])


def _is_usable(address: str) -> bool:
    """Tell whether others can have use of it, and one can listen there: a name may lead to an address that only others know."""
    meaning = ip_address(address.partition("%")[0])
    if meaning.is_loopback or meaning.is_link_local:
        return False
    try:
        with socket.socket(socket.AF_INET6 if meaning.version == 6 else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _numbers(run: Run) -> list[int]:
    return [int(name) for name in run.store.list(NOTES) if name.isdecimal()]


def _key(number: int) -> str:
    return f"{NOTES}/{number:06d}"
