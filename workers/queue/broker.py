"""The broker as people configure it: TLS that verifies, and what is wrong with it in words, without its password."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from storage.errors import UserError

_PASSWORD = re.compile(r"(\w[\w+.-]*://)[^\s/@]*@")


def tls(url: str, ca: Path | None) -> dict[str, Any] | None:
    """Return the TLS settings of a `rediss://` URL, None for another. Raises UserError where the certificates are not there.

    redis-py verifies by default, Celery hands it an empty setting and kombu then verifies nothing: so it is said here. What
    the URL itself says (`?ssl_ca_certs=`, `?ssl_cert_reqs=`) stands.
    """
    if urlsplit(url).scheme != "rediss":
        return None
    said = {name: values[-1] for name, values in parse_qs(urlsplit(url).query).items() if name.startswith("ssl_")}
    options: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    if ca is not None and "ssl_ca_certs" not in said:
        if not ca.is_file():
            raise UserError(f"HALP_BROKER_CA={ca}: there is no such file")
        options["ssl_ca_certs"] = str(ca)
    if said.get("ssl_cert_reqs", "").upper().removeprefix("CERT_") in {"NONE", "OPTIONAL"}:
        options["ssl_check_hostname"] = False
        options["ssl_cert_reqs"] = ssl.CERT_NONE
    return options | {name: value for name, value in said.items() if name != "ssl_cert_reqs"}


# What the client's errors say to what it means; `…` is where the error itself is repeated.
_MEANINGS = (
    ("OOM|maxmemory", "is full: its memory has reached maxmemory. Give it more, or delete what else is in it"),
    ("MISCONF|READONLY", "takes no writes (…)"),
    (
        "NOAUTH|Authentication required|WRONGPASS|invalid username-password",
        "refuses the password, or wants one: set it in HALP_BROKER_URL, as in redis://:PASSWORD@HOST:6379/0",
    ),
    ("(?i)DB index", "has no database of that number: HALP_BROKER_URL ends with it, as in /0"),
    ("NOPERM", "forbids what a worker must do (…): see the ACL in docs/operations.md"),
    ("CERTIFICATE_VERIFY_FAILED", "has a certificate that is not trusted (…): name its CA in HALP_BROKER_CA"),
    (
        "WRONG_VERSION_NUMBER|no answer to the TLS handshake|record layer",
        "speaks no TLS on that port (…): write redis:// in place of rediss://",
    ),
    ("closed by server|reset by peer", "closes the connection (…): a server that wants TLS is named rediss://"),
)


def trouble(error: BaseException) -> str:
    """Return what is wrong with the broker by an error of its client, without a URL's password."""
    text = _PASSWORD.sub(r"\1…@", str(error))
    meaning = next((said for words, said in _MEANINGS if re.search(words, text)), "does not answer (…)")
    return meaning.replace("…", text)
