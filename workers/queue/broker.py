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


def trouble(error: BaseException) -> str:
    """Return what is wrong with the broker by an error of its client, without a URL's password."""
    text = _PASSWORD.sub(r"\1…@", str(error))
    if "OOM" in text or "maxmemory" in text:
        return "is full: its memory has reached maxmemory. Give it more, or delete what else is in it"
    if "MISCONF" in text or "READONLY" in text:
        return f"takes no writes ({text})"
    if "NOAUTH" in text or "WRONGPASS" in text or "invalid username-password" in text:
        return "refuses the password: set it in HALP_BROKER_URL"
    if "NOPERM" in text:
        return f"forbids what a worker must do ({text}): see the ACL in docs/operations.md"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"has a certificate that is not trusted ({text}): name its CA in HALP_BROKER_CA"
    return f"does not answer ({text})"
