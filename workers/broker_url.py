"""The broker's URL as people write it: parsed once, refused in a sentence that repeats no part of it."""

from __future__ import annotations

import re
from pathlib import Path

_SCHEMES = ("redis", "rediss", "redis+socket")
_REFUSED = {
    "valkey": "Valkey speaks Redis' protocol: write redis:// in place of valkey://, and rediss:// for TLS",
    "unix": "a socket is written redis+socket:///PATH",
    "sentinel": "sentinel:// is not supported: name the server that is the master now",
    "cluster": "a Redis cluster is not supported: name a single server",
    "amqp": "RabbitMQ (amqp) is not supported: only Redis and Valkey are",
    "sqs": "SQS is not supported: only Redis and Valkey are",
    "http": "that is a web address: the broker speaks Redis' protocol",
}
_FORMS = "redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], rediss:// with TLS, or redis+socket:///PATH"
_QUOTE = "percent-encode the password (@ is %40, # is %23, / is %2F, : is %3A, % is %25)"
_MAX_PORT = 65535


def parse_broker_url(text: str) -> str:
    """Return the URL as kombu takes it. Raises ValueError: what is wrong with it, without any part of it but the scheme."""
    scheme, divider, rest = text.strip().partition("://")
    scheme = scheme.lower()
    if not divider or not re.fullmatch(r"[a-z][a-z0-9+.-]{0,30}", scheme):
        raise ValueError(f"is no URL: write {_FORMS}")
    if scheme not in _SCHEMES:
        why = next((why for word, why in _REFUSED.items() if word in scheme), f"{scheme}:// is not supported")
        raise ValueError(f"{why}. Write {_FORMS}")
    if scheme == "redis+socket":
        if not rest.startswith("/"):
            raise ValueError(
                "redis+socket:// wants the socket's absolute path: three slashes, as in redis+socket:///run/redis.sock"
            )
    else:
        _check_network(rest)
    return f"{scheme}://{rest}"


def read_broker_url(path: Path) -> str:
    """Return the URL in a file. Raises ValueError, OSError."""
    url = parse_broker_url(path.read_text())
    if not url.startswith("redis://"):
        raise ValueError("a file may name a server by redis:// alone")
    return url


def _check_network(rest: str) -> None:
    end = min((rest.index(mark) for mark in "/?#" if mark in rest), default=len(rest))
    place, tail = rest[:end], rest[end:]
    login, at, server = place.rpartition("@")
    port = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::(\d*))?", server)
    path, _, query = tail.partition("?")
    # A character that ends the login, or one that begins an escape that is none.
    in_path = "@" in path or ("@" in query and not at and (port is None or not server))
    if "@" in login or "#" in rest or in_path or re.search(r"\s|%(?![0-9A-Fa-f]{2})", login):
        raise ValueError(_QUOTE)
    if port is None or (port[1] and not 0 < int(port[1]) <= _MAX_PORT):
        raise ValueError(f"the port is no number from 1 to {_MAX_PORT}; if it belongs to a password, {_QUOTE}")
    if path.strip("/") and not path.strip("/").isdecimal():
        raise ValueError("the database is no number: it stands after the last slash, as in redis://HOST:6379/0")
