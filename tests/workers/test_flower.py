"""Flower as `workers flower` starts it, in a real browser: a run with failures and retries, and what a person sees of it."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Browser

from tests.support.brokers import start_broker
from tests.support.browser import Watched, chromium, watched_page
from tests.support.processes import command, start, wait_for, write_csv
from workers.monitor.flowerconfig import format_task

USER = ("reader", "hush")
HOSTILE = "<img src=x onerror=alert(1)>.png"


@dataclass
class Scene:
    """A run whose first questions succeed, with three that fail for good and one that is tried again and again."""

    url: str
    directory: Path
    variables: dict[str, str]
    flower: subprocess.Popen[bytes]
    worker: subprocess.Popen[bytes]

    def get(self, path: str, *, user: tuple[str, str] | None = USER, method: str = "GET") -> int:
        request = urllib.request.Request(self.url + path, method=method)
        if user:
            request.add_header("Authorization", "Basic " + base64.b64encode(":".join(user).encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (urllib.error.URLError, ConnectionError):
            return 0

    def states(self, run: str) -> dict[str, tuple[str, str]]:
        """Return the state of each task of a run as Flower's API tells it, with its question."""
        request = urllib.request.Request(f"{self.url}/api/tasks?limit=1000&taskname=workers.extract")
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(USER).encode()).decode())
        with urllib.request.urlopen(request, timeout=20) as answer:
            tasks = json.load(answer)
        arguments = {name: ast.literal_eval(task["kwargs"]) for name, task in tasks.items() if task["kwargs"]}
        return {
            name: (tasks[name]["state"], given["question_id"])
            for name, given in arguments.items()
            if given["run_dir"].endswith(f"/{run}")
        }

    def start_flower(self) -> None:
        log = self.directory / "flower.log"
        port = self.url.rpartition(":")[2]
        self.flower = start(
            "workers", "flower", "--port", port, "--db", self.directory / "flower.db", log=log, cwd=self.directory,
            **self.variables, FLOWER_BASIC_AUTH=":".join(USER),
        )  # fmt: skip
        wait_for(lambda: self.get("/healthcheck") == 200, 60, f"Flower answers; {log}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, photographs: Path, small_model: Path) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("flower")
    images = directory / "images"
    images.mkdir()
    names = [path.name for path in sorted(photographs.iterdir())]
    for path in photographs.iterdir():
        os.symlink(path, images / path.name)
    (images / "damaged.png").write_text("this is a text")
    (images / "again.png").symlink_to("again.png")  # opening it fails, but not as a missing file does
    rows = [(f"q{n}", name) for n, name in enumerate(names, start=1)]
    rows += [("damaged", "damaged.png"), ("gone", "gone.png"), ("hostile", HOSTILE), ("again", "again.png")]
    table = write_csv(
        directory / "vqa.csv",
        [{"question_id": q, "image_id": image, "question": "What is it?", "answer": ""} for q, image in rows],
    )
    broker = start_broker(directory / "broker")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    variables = {
        "HALP_BROKER_URL": f"redis://127.0.0.1:{broker.port}/0",
        "HALP_DATA_ROOTS": f"{directory}:{photographs}",
        "HALP_SWEEP_INTERVAL": "0.5",
        "HALP_MODEL": str(small_model),
        "HALP_ENGINE": "fake",
        "HALP_MAX_RETRIES": "30",
    }
    processes = []
    scene = Scene(url, directory, variables, None, None)  # type: ignore[arg-type]
    try:
        scene.start_flower()
        for name in ("extract", "collect"):
            processes.append(start("workers", name, log=directory / f"{name}.log", cwd=directory, **variables))
        scene.worker = processes[0]
        options = [
            "--images-dir", images, "--image-root", photographs, "--output-dir", directory / "output", "--model",
            small_model, "--allow-missing",
        ]  # fmt: skip
        wait_for(lambda: " ready." in (directory / "extract.log").read_text(), 90, "the worker is ready")
        result = command("producer", "enqueue", table, *options, **variables)
        assert result.returncode == 0, result.stderr
        yield scene
    finally:
        for process in [*processes, scene.flower]:
            if process is not None:
                process.kill()
                process.wait(10)
        broker.terminate()


def rows_of(watched: Watched, *, number: int, until: str) -> dict[str, list[str]]:
    """Return the tasks page's rows by the question's id, once so many and a text are there."""
    page = watched.page
    for _ in range(60):
        page.reload()
        page.select_option("select[name=tasks-table_length]", "50")
        page.wait_for_timeout(500)
        found = [row.locator("td").all_inner_texts() for row in page.locator("#tasks-table tbody tr").all()]
        rows = {cells[0].split()[0]: cells for cells in found if " · " in cells[0]}
        if len(rows) >= number and any(re.search(until, " ".join(cells)) for cells in rows.values()):
            return rows
        page.wait_for_timeout(1000)
    raise AssertionError(f"{until!r} and {number} rows are not on the page: {rows}")


def test_the_tasks_page(scene: Scene, browser: Browser, screenshots: Path | None) -> None:
    with watched_page(browser, user=USER, width=1500) as watched:
        page = watched.page
        page.on("dialog", lambda dialog: pytest.fail(f"a text from the dataset ran: {dialog.message}"))
        page.goto(f"{scene.url}/tasks")
        rows = rows_of(watched, number=16, until=r"attempt ([3-9]|\d\d)\b.* again in ")
        question, arguments, state, *_ = rows["q1"]
        assert question == "q1 · astronaut.png"
        assert arguments == "attempt 1 · run output · part 1, #0"
        assert state == "SUCCESS"
        for name, image, reason in [
            ("damaged", "damaged.png", "image_unreadable: …/damaged.png is not an image"),
            ("gone", "gone.png", "image_missing: …/gone.png does not exist"),
            ("hostile", HOSTILE, f"image_missing: …/{HOSTILE} does not exist"),
        ]:
            question, arguments, state, exception, *_ = rows[name]
            assert question == f"{name} · {image}"
            assert arguments.startswith("attempt 1 · run output")
            assert state == "FAILURE"
            assert exception.startswith(reason)
        question, arguments, state, exception, *_ = rows["again"]
        assert int(arguments.split()[1]) >= 3
        assert state in {"RETRY", "RECEIVED", "STARTED"}
        assert exception.startswith("TransientError('…/again.png: a symbolic link is in the way'), again in ")
        if screenshots:
            page.set_viewport_size({"width": 1500, "height": 760})
            page.screenshot(path=screenshots / "flower-tasks.png")
        page.click(".task-state-filter[data-task-state=FAILURE]")
        page.wait_for_function("document.querySelectorAll('#tasks-table tbody tr').length == 3")
        page.locator("#tasks-table tbody tr", has_text="gone.png").locator("a[href*='/task/']").click()
        page.wait_for_selector("#task-page")
        text = page.inner_text("#task-page")
        assert "FAILURE" in text
        assert "gone · gone.png" in text
        assert "attempt 1 · run output · part 1, #13" in text
        assert "image_missing: " in text
        assert "Traceback (most recent call last)" in text
        assert page.locator("#task-terminate, #task-revoke").count() == 0
        if screenshots:
            page.set_viewport_size({"width": 1500, "height": 960})
            page.screenshot(path=screenshots / "flower-task.png")
        assert watched.errors == []
        assert {url.split("/")[2] for url in watched.requests if not url.startswith("data:")} == {
            scene.url.removeprefix("http://")
        }


def test_it_asks_for_a_password_and_is_read_only(scene: Scene) -> None:
    assert scene.get("/tasks", user=None) == 401
    assert scene.get("/tasks", user=("reader", "wrong")) == 401
    assert scene.get("/api/tasks", user=None) == 401
    assert scene.get("/tasks") == 200
    assert scene.get("/api/task/revoke/x", method="POST") == 403
    command_line = Path(f"/proc/{scene.flower.pid}/cmdline").read_bytes()
    assert b"hush" not in command_line


@pytest.mark.slow
def test_dropped_questions_do_not_count_as_done(scene: Scene, photographs: Path, small_model: Path) -> None:
    rows = [
        {"question_id": f"c{n}", "image_id": "astronaut.png", "question": f"What about {n}?", "answer": ""} for n in range(6)
    ]
    rows[0]["question"] += " [error]"
    table, output = write_csv(scene.directory / "cancelled.csv", rows), scene.directory / "cancelled"
    options = ("--images-dir", photographs, "--output-dir", output, "--model", small_model)
    enqueue = ("producer", "enqueue", table, *options)
    scene.worker.send_signal(signal.SIGSTOP)
    try:
        assert command(*enqueue, **scene.variables).returncode == 0
        assert command("producer", "cancel", output, **scene.variables).returncode == 0
    finally:
        scene.worker.send_signal(signal.SIGCONT)
    wait_for(lambda: len(scene.states("cancelled")) == 6, 60, "Flower has heard of all")
    wait_for(
        lambda: {state for state, _ in scene.states("cancelled").values()} == {"REVOKED"},
        15,
        f"all are REVOKED: {scene.states('cancelled')}",
    )
    dropped = set(scene.states("cancelled"))
    assert command(*enqueue, **scene.variables).returncode == 0  # resumes it

    def again() -> dict[str, str]:
        return {question: state for name, (state, question) in scene.states("cancelled").items() if name not in dropped}

    def as_they_should_be() -> bool:
        states = again()
        # On a busy machine it may have had its last attempt, or be in one, at each look.
        first = states.pop("c0", None) in {"RETRY", "STARTED", "RECEIVED", "FAILURE"}
        return first and states == {f"c{n}": "SUCCESS" for n in range(1, 6)}

    wait_for(as_they_should_be, 60, "this time's states")
    assert {state for name, (state, _) in scene.states("cancelled").items() if name in dropped} == {"REVOKED"}
    assert command("producer", "cancel", output, **scene.variables).returncode == 0


def test_the_tasks_outlive_flower(scene: Scene, browser: Browser) -> None:
    scene.flower.send_signal(signal.SIGTERM)
    scene.flower.wait(60)
    scene.start_flower()
    with watched_page(browser, user=USER) as watched:
        watched.page.goto(f"{scene.url}/tasks")
        rows = rows_of(watched, number=16, until="q1 ")
    assert rows["gone"][3].startswith("image_missing: ")


def test_an_open_address_needs_a_password() -> None:
    result = command("workers", "flower", "--address", "0.0.0.0")
    assert result.returncode == 2
    assert "set FLOWER_BASIC_AUTH=user:password" in result.stderr
    allowed = command("workers", "flower", "--address", "0.0.0.0", "--basic-auth", "me:secret", "--", "--help")
    assert allowed.returncode == 0
    assert "--max_tasks=20000" in allowed.stderr
    assert "secret" not in allowed.stderr


@pytest.mark.parametrize(
    ("exception", "shown"),
    [
        ("PermanentError('image_missing', '/x/a.jpg does not exist')", "image_missing: …/a.jpg does not exist"),
        ("PermanentError('broken", "PermanentError('broken"),
        (
            "PermanentError(__import__('os').system('true'), 'x')",
            "PermanentError(__import__('os').system('true'), 'x')",
        ),
        ("TransientError('again')", "TransientError('again')"),
        ("Retry(Retry(...), TransientError('a, b'), 1.7315)", "TransientError('a, b'), again in 2 s"),
        (r"PermanentError('image_missing', 'a\u202egnp.exe')", r"image_missing: a\u202egnp.exe"),
        (None, None),
    ],
)
def test_a_reason_stands_first(exception: str | None, shown: str | None) -> None:
    task = SimpleNamespace(args="()", kwargs="{}", exception=exception, retries=0)
    assert format_task(task).exception == shown


@pytest.mark.parametrize("kwargs", ["{'run_dir': '/data/outp...", "[]", "{'a': 1}", None])
def test_arguments_that_are_not_ours_stay(kwargs: str | None) -> None:
    shown = format_task(SimpleNamespace(args="()", kwargs=kwargs, exception=None, retries=None))
    assert (shown.args, shown.kwargs) == ("()", kwargs)
