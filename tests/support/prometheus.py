"""Debian's Prometheus: its checker of files, and a server of one's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"


def required(program: str) -> str:
    """Return where a program is. A machine without it skips, unless it is CI."""
    if (found := shutil.which(program)) is None:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {program}: apt-get install prometheus")
        pytest.skip(f"there is no {program}: apt-get install prometheus")
    return found


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run promtool to its end."""
    line = [required("promtool"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def hasten(rules: str) -> str:
    """Return alert rules with seconds in place of minutes and hours: what they wait for, and the time that they look back."""
    return re.sub(r"(for: |\[)\d+[mh]", lambda found: f"{found[1]}{'3s' if found[1] == 'for: ' else '10s'}", rules)


class Prometheus:
    """A server with the files of deploy/monitoring/ in a directory of its own, these targets, and times for a test to wait."""

    def __init__(self, directory: Path, targets: list[str]) -> None:
        shutil.copytree(MONITORING, directory)
        config = (directory / "prometheus.yml").read_text()
        assert config.count(": 15s") == 2
        (directory / "prometheus.yml").write_text(config.replace(": 15s", ": 1s"))
        (directory / "rules.yml").write_text(hasten((directory / "rules.yml").read_text()))
        (directory / "targets.yml").write_text(json.dumps([{"targets": targets}]))
        self._address = f"127.0.0.1:{free_port()}"
        arguments = [
            f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={self._address}",
        ]  # fmt: skip
        with (directory / "log").open("wb") as log:
            program = [required("prometheus"), *arguments]
            self._process = subprocess.Popen(program, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def ask(self, path: str, **parameters: str) -> Any:
        """Return what the HTTP API answers. Raises HTTPError with what is wrong with an expression."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return the labels and the value of each series that an expression yields now."""
        return [(found["metric"], float(found["value"][1])) for found in self.ask("query", query=expression)["result"]]

    def firing(self, alert: str) -> list[dict[str, str]]:
        """Return the labels of each alert of a name that fires."""
        alerts = self.ask("alerts")["alerts"]
        return [a["labels"] for a in alerts if a["state"] == "firing" and a["labels"]["alertname"] == alert]

    def ready(self) -> bool:
        """Tell whether it answers."""
        try:
            return bool(self.ask("status/config"))
        except (urllib.error.URLError, ConnectionError):
            return False

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait(10)
