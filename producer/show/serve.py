"""A web page of a run for whoever sits at this machine: read-only, on the loopback address alone, behind a key in its address.

Every user of a machine can reach its loopback address, and so can every web page in a browser there, by a name of its own that
leads to it. So the address has a key in it, and a request must be made to this machine by one of its own names.
"""

from __future__ import annotations

import errno
import logging
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

from producer.show.board import Board
from producer.show.page import POLICY, render
from storage.errors import UserError
from storage.runs.run import Run

logger = logging.getLogger(__name__)
PORT = 5556  # beside Flower's
_ADDRESS = "127.0.0.1"
_NAMES = {_ADDRESS, "localhost", "::1"}  # of this machine, also behind a forwarded port
_SILENCE = 20  # seconds after which a connection is closed that says nothing
_PATIENCE = 5.0  # seconds that the end waits for a look at the run
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Server(ThreadingHTTPServer):
    """Serves the page of one run until it is closed. Raises UserError where the port is taken."""

    def __init__(self, run: Run, port: int) -> None:
        self.run, self.board, self.path = run, Board(run), f"/{secrets.token_urlsafe(16)}/"
        try:
            super().__init__((_ADDRESS, port), _Handler)
        except OSError as error:
            if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                raise
            raise UserError(f"--port {port}: {error.strerror}; name another one, or 0 for any that is free") from None

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{_ADDRESS}:{self.server_port}{self.path}"

    def close(self) -> None:
        """Answer nobody any more; what is being read is read to its end, as HDF5 would not survive the end of Python."""
        self.server_close()
        self.board.close(_PATIENCE)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of ours; a browser that has gone away is none."""
        if not isinstance(sys.exc_info()[1], OSError):
            logger.exception("a request failed")


class _Handler(BaseHTTPRequestHandler):
    timeout = _SILENCE
    server_version, sys_version = "halp-extractor", ""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        server = cast(Server, self.server)
        if not self._is_asked_by_its_name():
            self.send_error(HTTPStatus.FORBIDDEN, "Not a name of this machine")
        elif not secrets.compare_digest(path.encode(errors="replace"), server.path.encode()):
            self.send_error(HTTPStatus.NOT_FOUND, "Not found: the address that the command printed has a key in it")
        else:
            page = render(server.run, server.board.look(), query.removeprefix("samples="))
            self._answer(HTTPStatus.OK, page, "text/html; charset=utf-8")

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a line of text; a method that is not ours is one that is not allowed."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self.close_connection = True
        text = status.phrase if status != code or message is None else message
        self._answer(status, f"{text}\n".encode(errors="replace"), "text/plain; charset=utf-8")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a request comes every few seconds."""

    def _is_asked_by_its_name(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        try:
            return len(hosts) == 1 and urlsplit(f"//{hosts[0]}").hostname in _NAMES
        except ValueError:  # brackets without an address
            return False

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = _HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
