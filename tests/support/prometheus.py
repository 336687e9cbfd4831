"""Debian's Prometheus and Alertmanager: their checkers of files, and servers of one's own."""

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
        missing = f"there is no {program}: apt-get install prometheus prometheus-alertmanager"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def checker(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run promtool or amtool to its end."""
    line = [required(program), *map(str, arguments)]
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
    """Servers with the files of deploy/monitoring/ in a directory of their own, these targets, and times for a test to wait."""

    def __init__(self, directory: Path, targets: list[str], mail: str) -> None:
        shutil.copytree(MONITORING, directory)
        self._directory = directory
        self._address, manager = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self._replace("prometheus.yml", {": 15s": ": 1s", "localhost:9093": manager})
        self._replace("alertmanager.yml", {": 30s": ": 1s", ": 5m": ": 2s", "localhost:25": mail})
        (directory / "rules.yml").write_text(hasten((directory / "rules.yml").read_text()))
        self.scrape(targets)
        self._processes = [
            self._start("prometheus", self._address, "--config.file=prometheus.yml", "--storage.tsdb.path=data"),
            self._start(
                "prometheus-alertmanager", manager, "--config.file=alertmanager.yml", "--storage.path=manager",
                "--cluster.listen-address=",
            ),
        ]  # fmt: skip

    def _replace(self, name: str, words: dict[str, str]) -> None:
        text = (self._directory / name).read_text()
        for old, new in words.items():
            assert old in text
            text = text.replace(old, new)
        (self._directory / name).write_text(text)

    def _start(self, program: str, address: str, *arguments: str) -> subprocess.Popen[bytes]:
        line = [required(program), *arguments, f"--web.listen-address={address}"]
        with (self._directory / f"{program}.log").open("wb") as log:
            return subprocess.Popen(
                line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self._directory, start_new_session=True
            )

    def scrape(self, targets: list[str]) -> None:
        """Scrape these from now on."""
        (self._directory / "targets.yml").write_text(json.dumps([{"targets": targets}]))

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
        """Stop them."""
        for process in self._processes:
            process.kill()
            process.wait(10)
