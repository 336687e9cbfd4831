"""The page of a run: in a real browser while the run goes on; what strangers wrote, who may ask for it, what it costs."""

from __future__ import annotations

import base64
import csv
import http.client
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from producer.show import board as board_module
from producer.show.board import Board
from producer.show.listeners import Listeners
from producer.show.page import render
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.stores.object_store import ObjectStore
from storage.views import report_data
from tests.producer.test_live import GPU, worker
from tests.support.browser import chromium, watched_page
from tests.support.builders import make_failure, make_questions, make_run, make_sample, stage
from tests.support.clusters import Cluster, table_of
from tests.support.processes import BIN, command, environment, with_word, write_csv
from tests.support.s3_server import S3Server
from workers.demo.easy_vqa import MODEL, read_easy_vqa

NOWHERE = {"HALP_BROKER_URL": "redis://127.0.0.1:1/0"}
RUN_OVER = "document.title='run over'"
ACTIVE = f'<script>{RUN_OVER}</script><img src=x onerror="{RUN_OVER}">'
HOSTILE = f'{ACTIVE}</section><meta http-equiv=refresh content="0;url=/x">'
SCENE = Path("/tmp/easy-vqa")  # of the picture: its paths are seen
TURNED = "a\u202egnp.exe"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Serving:
    """`producer status DIR --serve` in a process of its own."""

    def __init__(self, run: str | Path, variables: dict[str, str]) -> None:
        line = [str(BIN / "producer"), "status", str(run), "--serve", "--port", "0"]
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables)
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{22}/", self.url), self.process.communicate()

    def ask(self, method: str = "GET", path: str | None = None, **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        try:
            connection.request(method, parts.path if path is None else path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def ask_plainly(self, request: str) -> str:
        """Send bytes as they are; return the first line of the answer."""
        parts = urlsplit(self.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
            connection.sendall(request.encode())
            return connection.makefile("r").readline().strip()

    def end(self, number: int = signal.SIGINT) -> str:
        """End it as a person does; return what it said on stderr."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 130, said
        return said


@contextmanager
def serving(run: str | Path, **variables: str) -> Iterator[Serving]:
    server = Serving(run, NOWHERE | variables)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def counts(page: Page) -> list[int]:
    """Return planned, written, failed, staged, outstanding, parts and all parts as the page shows them."""
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", page.inner_text("#counts"))]


def until(page: Page, condition: Callable[[], bool], what: str) -> None:
    """Wait for what an open page shows."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {page.inner_text('body')}"
        page.wait_for_timeout(200)


def data_of(cluster: Cluster, images: Path, real: bool) -> tuple[Path, Path, int, dict[str, str]]:
    """Return a table, its images, how many rows it has, and what makes a worker answer it; real where a picture is taken."""
    if not real:
        table, _ = table_of(cluster.directory / "vqa.csv", 80)
        return table, images, 80, {"HALP_ENGINE": "fake:1"}
    data = read_easy_vqa("test")
    shutil.copytree(data.images_dir, SCENE / "images")
    shutil.copytree(MODEL, SCENE / MODEL.name)
    rows = [
        {"question_id": f"easy-vqa-test-{n:05d}", "image_id": row.image_id, "question": row.question, "answer": row.answer}
        for n, row in enumerate(data.rows[:9600])
    ]
    cluster.directory, cluster.model = SCENE, SCENE / MODEL.name
    cluster.variables |= {"HALP_DATA_ROOTS": str(SCENE), "HALP_MODEL": str(cluster.model), "HALP_MAX_BATCH_SIZE": "0"}
    return write_csv(SCENE / "vqa.csv", rows), SCENE / "images", 9600, {}


@pytest.fixture
def scene() -> Iterator[None]:
    """Remove what the picture was taken of, when nobody writes there any more."""
    yield
    shutil.rmtree(SCENE, ignore_errors=True)


@pytest.mark.slow
def test_an_open_page_follows_a_run(
    scene: None, cluster: Cluster, images: Path, browser: Browser, screenshots: Path | None
) -> None:
    """From before its first worker to its end, without a reload: numbers, workers, a failure, samples.

    The last image cannot be opened until the page has said so: the run waits for a slow machine.
    """
    table, images, number, variables = data_of(cluster, images, real=screenshots is not None)
    with table.open() as file:
        missing, last = images / "7.png", images / [row["image_id"] for row in csv.DictReader(file)][-1]
    content = last.read_bytes()
    for image in (missing, last):
        image.unlink()
    last.symlink_to(last.name)
    output, interval = cluster.directory / "output", number // 8
    result = cluster.enqueue(table, images, output, "--checkpoint-interval", interval)
    assert result.returncode == 0, result.stderr
    with serving(output, **cluster.variables) as server, watched_page(browser) as watched:
        page = watched.page
        page.goto(server.url)
        page.evaluate("window.opened = true")
        assert counts(page) == [number, 0, 0, 0, number, 0, 8]
        assert "waiting for the first question" in page.inner_text("#going")
        assert "No worker at redis://" in page.inner_text("#problems")
        assert page.title() == "0% output"
        cluster.collector()
        cluster.start("workers", "extract", HALP_MAX_RETRIES="30", **variables)
        until(page, lambda: bool(re.match(r"[\d.]+/s, .* left, ", page.inner_text("#going"))), "the rate and the time left")
        until(page, lambda: "No worker" not in page.inner_text("#problems"), "the worker is known")
        if screenshots:
            until(page, lambda: counts(page)[2] > 0 and counts(page)[5] > 1, "failures are there")
            page.set_viewport_size({"width": 1200, "height": 1040})
            page.screenshot(path=screenshots / "status.png")
        until(page, lambda: counts(page)[5] == 7 and counts(page)[3] > 0, "all but the last part are there")
        until(page, lambda: "tried again (" in page.inner_text("#problems"), "the last image's questions are tried again")
        assert re.search(r"extract-\d+@\S+\s+(busy|ready)\s", page.inner_text("#workers"))
        last.unlink()
        last.write_bytes(content)
        until(page, lambda: page.inner_text("#going") == "Finished.", "the end")
        planned, written, failed, staged, outstanding, *parts = counts(page)
        assert (planned, written + failed, staged, outstanding, parts) == (number, number, 0, 0, [8, 8])
        assert failed > 0
        assert page.locator("#reasons tr").all_inner_texts() == [f"image_missing\t{failed}"]
        assert f"{missing.name} does not exist" in page.inner_text("#examples")
        assert page.locator("#samples .card").count() == 12
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.evaluate("window.opened")  # it is the page that was opened
        assert page.title() == "100% output"
        assert watched.errors == []
        asked = [url.partition("?")[0] for url in watched.requests if not url.startswith("data:")]
        assert set(asked) == {server.url}
        assert server.end() == "A page to look at, for this machine alone. Ctrl-C ends it.\n"
        page.evaluate("refresh()")
        assert page.is_visible("#gone")
        assert counts(page)[:2] == [planned, written]


def test_the_samples_are_sent_once(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", 9)
    stage(run, 1)
    assert pack(run, 1)
    with serving(run.location) as server, watched_page(browser) as watched:
        page = watched.page
        page.goto(server.url)
        assert page.locator("#samples .card").count() == 3
        with page.expect_response(lambda answer: "?samples=" in answer.url) as found:
            page.evaluate("refresh()")
        assert 'id="samples"' not in found.value.text()
        assert page.locator("#samples .card").count() == 3
        stage(run, 2)
        assert pack(run, 2)
        until(page, lambda: page.locator("#samples .card").count() == 6, "the next part's")
        assert "answer to q4" in page.locator("#samples .card").first.inner_text()  # the newest part's


@pytest.fixture
def hostile(tmp_path: Path) -> Run:
    """A run in which strangers wrote ids, questions, answers, truths, and what a failure and a worker say."""
    images = tmp_path / "images"
    images.mkdir()
    questions = [replace(q, question=HOSTILE + TURNED, ground_truth_answer=HOSTILE) for q in make_questions(6)]
    questions[0] = replace(questions[0], question_id=f"q1 {HOSTILE}{TURNED}")
    for question in questions:
        Image.new("RGB", (90, 60), (200, 30, 30)).save(images / question.image_id)
    run = make_run(tmp_path / HOSTILE.replace("/", "_"), questions, images_dir=str(images))
    for sequence, question in enumerate(run.questions(1)):
        if sequence == 1:
            run.stage_failure(1, sequence, make_failure(question, reason=HOSTILE, message=HOSTILE + TURNED))
        else:
            run.stage_sample(1, sequence, make_sample(question, answer=HOSTILE + TURNED))
    assert pack(run, 1)
    run.note_refusal("extract-1@host", HOSTILE + TURNED)
    return run


def test_what_strangers_wrote_does_nothing(hostile: Run, browser: Browser) -> None:
    with serving(hostile.location) as server, watched_page(browser) as watched:
        page = watched.page
        page.goto(server.url)
        for _ in range(2):
            assert page.title() == f"50% {hostile.output_dir.name}"
            assert page.locator("h1 bdi").text_content() == hostile.output_dir.name
            sample = page.locator("#samples .card").first
            shown = [text.strip() for text in sample.locator("bdi").all_text_contents()]
            escaped = HOSTILE + TURNED.replace("\u202e", r"\u202e")
            assert shown == [f"q1 {escaped}", "image_0.jpg", escaped, escaped, HOSTILE]
            assert page.locator("#reasons td").first.text_content() == HOSTILE
            assert escaped in page.locator("#examples bdi").all_text_contents()
            assert f"refused by extract-1@host: {escaped}" in page.locator("#problems bdi").all_text_contents()
            assert page.locator("section").count() == 5
            page.evaluate("refresh()")
        assert "\u202e" not in page.content()
        assert page.evaluate("[...document.images].map(image => image.src.slice(0, 16))") == ["data:image/jpeg;"] * 2
        assert watched.errors == []
        assert {url.partition("?")[0] for url in watched.requests if not url.startswith("data:")} == {server.url}
        page.evaluate(f"document.querySelector('h1').innerHTML = {ACTIVE!r}")  # had one been left as it is
        until(page, lambda: any("Content Security Policy" in error for error in watched.errors), "the browser refuses it")
        assert page.title() == f"50% {hostile.output_dir.name}"


def test_a_narrow_window_does_not_scroll_sideways(hostile: Run, browser: Browser) -> None:
    with serving(hostile.location) as server, watched_page(browser, "dark", width=400) as watched:
        watched.page.goto(server.url)
        assert watched.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert watched.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"


def test_who_may_ask_for_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with serving(run.location) as server:
        parts = urlsplit(server.url)
        status, headers, page = server.ask()
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
        head = server.ask("HEAD")
        assert (head[0], head[2]) == (200, "")
        assert abs(int(head[1]["Content-Length"]) - len(page.encode())) < 100
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"):
            status, headers, _ = server.ask(method)
            assert (status, headers["Allow"]) == (405, "GET, HEAD")
        for host in ("localhost:8000", f"127.0.0.1:{parts.port}", "[::1]:8000", "LOCALHOST"):
            assert server.ask(Host=host)[0] == 200, host
        for host in ("evil.example", f"evil.example:{parts.port}", "127.0.0.1.evil.example", "evil@", "[", "", "127.0.0.2"):
            assert server.ask(Host=host)[0] == 403, host
        first = f"GET {parts.path} HTTP/1.1\r\n"
        for headers_ in ("", "Host: localhost\r\nHost: evil.example\r\n"):
            assert " 403 " in server.ask_plainly(f"{first}{headers_}\r\n")
        for path in ("/", parts.path[:-1], f"{parts.path}x", f"{parts.path}.run/run.json", "/../../etc/passwd", "/%2e%2e/"):
            assert server.ask(path=path)[0] == 404, path
        assert " 404 " in server.ask_plainly(f"GET http://evil.example{parts.path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert "Bad request" in server.ask_plainly("what\r\n\r\n")
        with pytest.raises(ConnectionRefusedError):  # it would be there on every address of this machine
            socket.create_connection(("127.0.0.2", parts.port), timeout=60)
        taken = command("producer", "status", run.location, "--serve", "--port", parts.port, **NOWHERE)
        told = f"error: --port {parts.port}: Address already in use; name another one, or 0 for any that is free\n"
        assert (taken.returncode, taken.stderr) == (2, told)
        assert server.end() == "A page to look at, for this machine alone. Ctrl-C ends it.\n"
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options", [("--serve", "--watch"), ("--serve", "--failed"), ("--serve", "--json"), ("--port", "1")])
def test_options_that_do_not_go_together(tmp_path: Path, options: tuple[str, ...]) -> None:
    result = command("producer", "status", make_run(tmp_path, 3).location, *options)
    assert result.returncode == 2
    assert result.stderr == "error: --serve goes with --port, and with no other option; --port with --serve alone\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_while_somebody_is_connected(tmp_path: Path, number: int) -> None:
    run = make_run(tmp_path, 3)
    with serving(run.location) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port)) as silent:
            silent.sendall(b"GET ")
            assert server.ask()[0] == 200  # nobody waits for the one who says nothing
            server.end(number)
    assert not with_word(str(tmp_path))


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    result = command("producer", "status", tmp_path, "--serve")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path} holds no run")


# Without a server: what is gathered, and how often


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Listeners]:
    """What the queue answers, the next time first; the last answer stays."""
    answers = [Listeners([], [])]
    monkeypatch.setattr(board_module, "listening_workers", lambda _: answers.pop(0) if len(answers) > 1 else answers[0])
    return answers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass."""
    passed = 0.0
    monotonic = time.monotonic

    def go(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    monkeypatch.setattr(board_module.time, "monotonic", lambda: monotonic() + passed)
    return go


def text_of(run: Run, board: Board) -> str:
    return render(run, board.look()).decode()


def test_a_run_that_is_over(tmp_path: Path, asked: list[Listeners], clock: Callable[[float], None]) -> None:
    """Nobody is asked who serves it; a retry makes it go on."""
    run = make_run(tmp_path / "finished", 3)
    stage(run, 1, failed=[1])
    assert pack(run, 1)
    asked[0] = Listeners([worker()], ["a problem"])
    board = Board(run)
    assert (board.look().account.finished, board.look().listeners.workers, board.look().problems) == (True, [], [])
    assert ">Finished.</b>" in text_of(run, board)
    run.part_path(1).unlink()
    clock(61)
    assert f"{run.part_name(1)} was published and is gone" in text_of(run, board)
    cancelled = make_run(tmp_path / "cancelled", 3)
    cancelled.cancel()
    assert "Cancelled: " in text_of(cancelled, Board(cancelled))


def test_a_run_whose_queue_cannot_be_asked(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    (tmp_path / ".run" / "lock").touch()  # as `producer run` leaves one
    with serving(run.location) as server:
        page = server.ask()[2]
    assert "`producer run` brings its own" in page
    assert "What does not get on" not in page


def test_the_workers(tmp_path: Path, asked: list[Listeners], clock: Callable[[float], None]) -> None:
    """As `producer status` tells them; columns without a value are left out, and a long list of problems is cut."""
    run = make_run(tmp_path, 3)
    asked[0] = Listeners([worker(model=HOSTILE)], [f"problem {n}" for n in range(50)], "a note")
    asked.append(Listeners([worker(**GPU)], []))
    board = Board(run)
    page = text_of(run, board)
    assert re.findall("<th>(.*?)</th>", page) == [
        "worker", "state", "model", "on", "last heard of", "questions", "per batch", "per prefix",
    ]  # fmt: skip
    assert "<td><bdi>12.0</bdi></td>" in page
    assert HOSTILE not in page
    assert "problem 19<" in page
    assert "problem 20" not in page
    assert "and 30 more" in page
    assert "a note" in page
    clock(11)
    page = text_of(run, board)
    assert "20.0 of 80.0 GB" in page
    assert "problem" not in re.sub("(?s)<style.*?</style>|<section id=.*?>", "", page)


def test_failures_of_every_reason(tmp_path: Path, asked: list[Listeners], clock: Callable[[float], None]) -> None:
    run = make_run(tmp_path, 60, checkpoint_interval=20)
    for part in (1, 2):
        for sequence, question in enumerate(run.questions(part)):
            reason = "image_missing" if part == 1 or sequence else "out_of_memory"
            run.stage_failure(part, sequence, make_failure(question, reason=reason))
    assert pack(run, 1)
    board = Board(run)
    shown = [(f.failure.reason, f.published) for f in board.look().failures]
    assert shown == [("out_of_memory", False), *[("image_missing", False)] * 3]
    assert pack(run, 2)
    clock(61)
    failures = board.look().failures
    assert [f.failure.reason for f in failures] == ["image_missing"] * 3 + ["out_of_memory"]
    assert all(f.published for f in failures)
    assert board.look().account.reasons == {"image_missing": 39, "out_of_memory": 1}


def test_a_look_costs_little(
    tmp_path: Path, asked: list[Listeners], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, 60, checkpoint_interval=6)
    for part in range(1, 8):
        stage(run, part)
        assert pack(run, part)
    thumbnails, gathered, slow = [], [], 0.0
    monkeypatch.setattr(report_data, "_thumbnail", lambda _, image: thumbnails.append(image) or "")
    gather = Board._gather

    def counted(self: Board) -> object:
        gathered.append(1)
        clock(slow)
        return gather(self)

    monkeypatch.setattr(Board, "_gather", counted)
    board = Board(run)
    for _ in range(100):
        board.look()
    assert (len(gathered), len(thumbnails)) == (1, 12)  # of four parts, three questions each
    clock(5)
    for _ in range(100):
        board.look()
    assert (len(gathered), len(thumbnails)) == (2, 12)
    stage(run, 8)
    assert pack(run, 8)
    slow = 2.0
    clock(5)
    assert "answer to q43" in str(board.look().samples[0])
    assert (len(gathered), len(thumbnails)) == (3, 15)
    clock(35)  # twenty times what the last look took are 40 s
    board.look()
    assert len(gathered) == 3
    clock(10)
    board.look()
    assert len(gathered) == 4


def test_slow_images_come_later(
    tmp_path: Path, asked: list[Listeners], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, 9)
    for part in (1, 2, 3):
        stage(run, part)
        assert pack(run, part)
    monkeypatch.setattr(report_data, "_thumbnail", lambda *_: clock(2) or "")
    board = Board(run)
    assert len(board.look().samples) == 3
    for number in (6, 9, 9):
        clock(61)
        assert len(board.look().samples) == number


def test_a_run_that_cannot_be_looked_at_any_more(
    tmp_path: Path, asked: list[Listeners], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was seen stays, with the reason; it is looked at again later."""
    run = make_run(tmp_path / "run", 3)
    board = Board(run)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    clock(5)
    look = board.look()
    assert look.account.planned == 3
    assert str(tmp_path / "run") in look.trouble
    assert "What follows is old" in text_of(run, board)
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    clock(61)
    assert board.look().trouble == ""
    with monkeypatch.context() as patch:
        patch.setattr(board._books, "account", lambda: 1 // 0)
        clock(61)
        with pytest.raises(ZeroDivisionError):  # a mistake of ours is not hidden
            board.look()
    assert board.look().trouble == ""  # and it is looked at again


def test_a_damaged_part_costs_its_samples_alone(tmp_path: Path, asked: list[Listeners]) -> None:
    run = make_run(tmp_path, 6)
    for part in (1, 2):
        stage(run, part)
        assert pack(run, part)
    run.part_path(2).write_bytes(b"no part")
    look = Board(run).look()
    assert [shown.question_id for shown in look.samples] == ["q1", "q2", "q3"]
    assert "it was published with" in look.problems[0]


def test_a_run_in_an_object_store(
    tmp_path: Path, s3_server: S3Server, s3_url: str, asked: list[Listeners], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the parts only what is shown is fetched; images lie there too."""
    run = make_run(tmp_path / "run", 6, images_dir=f"{s3_url}/images")
    Image.new("RGB", (90, 60), (200, 30, 30)).save(tmp_path / "image.jpg")
    s3_server.write(f"{s3_url}/images/image_0.jpg", (tmp_path / "image.jpg").read_bytes())
    stage(run, 1, failed=[1])
    assert pack(run, 1)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            s3_server.write(f"{s3_url}/run/{path.relative_to(tmp_path / 'run')}", path.read_bytes())
    monkeypatch.setattr(ObjectStore, "local_copy", lambda *_: pytest.fail("fetched whole"))
    there = Run.open(f"{s3_url}/run")
    board = Board(there)
    look = board.look()
    assert (look.account.written, look.account.failed, look.account.outstanding) == (2, 1, 3)
    assert [(shown.question_id, bool(shown.thumbnails[0])) for shown in look.samples] == [("q1", True), ("q3", False)]
    assert base64.b64decode(look.samples[0].thumbnails[0].partition(",")[2]).startswith(b"\xff\xd8")
    page = text_of(there, board)
    assert f"<bdi>{s3_url}/run</bdi>" in page
    assert "of disk free" not in page
