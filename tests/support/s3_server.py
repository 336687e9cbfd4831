"""A real S3-compatible server (moto) in a process of its own, with the faults that a network has.

`python -m tests.support.s3_server PORT` serves. Requests are computed one after the other: S3 decides create-only PUTs
atomically, while moto's threads check and then write; and a GET during a PUT of the same object fails there now and then.
`/_control` tells how many requests of each kind there were, and sets faults: `lose`, so many answers to PUTs are lost after
the object is written; `deny`, a method that is refused; `away`, every connection is cut.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

from tests.support.processes import wait_for

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "hidden-secret", "AWS_REGION": "us-east-1"}


class S3Server:
    """A server on a port of its own, with a bucket `bucket`."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.variables = {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.port)], stdout=log, stderr=log, cwd=Path(__file__).parents[2]
            )
        wait_for(self._answers, 60, "the S3 server answers")
        self.request("PUT", "/bucket")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def write(self, url: str, data: bytes) -> None:
        """Create or replace an object."""
        self.request("PUT", "/" + quote(url.removeprefix("s3://")), data)

    def read(self, url: str) -> bytes:
        """Return an object's bytes."""
        return self.request("GET", "/" + quote(url.removeprefix("s3://")))

    def objects(self, url: str) -> dict[str, bytes]:
        """Return all objects below a URL."""
        return {key: self.read(f"{url}/{key}") for key in self.keys(url)}

    def keys(self, url: str) -> list[str]:
        """Return the keys of all objects below a URL."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        keys, token = [], ""
        while True:
            query = urlencode({"list-type": 2, "prefix": f"{prefix}/"} | ({"continuation-token": token} if token else {}))
            page = ElementTree.fromstring(self.request("GET", f"/{bucket}?{query}"))
            keys += [entry.text or "" for entry in page.iterfind("{*}Contents/{*}Key")]
            token = page.findtext("{*}NextContinuationToken") or ""
            if not token:
                return [key.removeprefix(f"{prefix}/") for key in keys]

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Ask the server past every client library."""
        headers = {"Authorization": "not anonymous", "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def control(self, **faults: Any) -> dict[str, int]:
        """Set faults; return how many requests of each kind there were since the last call."""
        counted: dict[str, int] = json.loads(self.request("POST", "/_control", json.dumps(faults).encode()))
        return counted

    def _answers(self) -> bool:
        try:
            self.control()
        except OSError:
            return False
        return True


class _Faulty:
    """The server's application with its faults and counters."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self._computing = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.faults: dict[str, Any] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        if environ["PATH_INFO"] == "/_control":
            return self._control(environ, start_response)
        self._counts["LIST" if "list-type" in query else "DELETE" if query.startswith("delete") else method] += 1
        if self.faults.get("deny") == method:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            key = CREDENTIALS["AWS_ACCESS_KEY_ID"]
            return [f"<Error><Code>AccessDenied</Code><AWSAccessKeyId>{key}</AWSAccessKeyId></Error>".encode()]
        with self._computing:
            answer = list(self._application(environ, start_response))
        if method == "PUT" and self.faults.get("lose", 0) > 0:
            self.faults["lose"] -= 1
            start_response("500 Internal Server Error", [("Content-Length", "0")], (None, None, None))
            return [b""]
        return answer

    def _control(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        self.faults |= json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        counted, self._counts = self._counts, Counter()
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(counted).encode()]


def _serve(port: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, run_simple

    application = _Faulty(DomainDispatcherApplication(create_backend_app))

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def run_wsgi(self) -> None:
            if application.faults.get("away") and self.path != "/_control":
                self.close_connection = True
            else:
                super().run_wsgi()

        def log_request(self, *_: object) -> None:
            """Keep the log for errors."""

    run_simple("127.0.0.1", port, application, threaded=True, request_handler=Handler)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
