"""Tables on terminals of 80 and 120 columns, with ids of 30 characters and the long paths that runs have."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from producer.show.display import workers_table
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.screen.console import Console
from storage.screen.tables import Name, Sentence, Table, cut
from tests.producer.test_live import GPU, worker
from tests.support.builders import make_failure, make_questions, make_run, make_sample

WIDTHS = pytest.mark.parametrize("width", [80, 120])
VISION = "vision_encoder_representation"


def long_id(number: int) -> str:
    return f"coco-val2014-000000{number:06d}-{number:05d}"


def publish(path: Path, *, shift: float = 0.0) -> Run:
    """Publish a run under a long path; its ids have 30 characters; the third question failed, with a long message."""
    questions = [
        replace(q, question_id=long_id(n), question="What is the man in the red jacket holding in his left hand?")
        for n, q in enumerate(make_questions(6, per_image=1))
    ]
    run = make_run(path, questions, checkpoint_interval=6)
    for sequence, question in enumerate(run.questions(1)):
        if sequence == 2:
            message = f"{path}/images/train/{question.image_id} does not exist"
            run.stage_failure(1, sequence, replace(make_failure(question), message=message))
            continue
        sample = make_sample(question)
        sample.vectors[VISION] = sample.vectors[VISION] + type(sample.vectors[VISION][0])(shift)
        run.stage_sample(1, sequence, replace(sample, answer=f"{sample.answer} {shift}"))
    assert pack(run, 1)
    return run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "a-directory-with-quite-a-long-name-for-it" / "qwen25vl-7b-main-experiment-2026"


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, width: int) -> int:
    monkeypatch.setenv("COLUMNS", str(width))
    return width


def check_lines(out: str, width: int, *, least: int = 12) -> None:
    """Every line fits; an id is whole, or cut in the middle and never folded."""
    assert max(map(cell_len, out.splitlines())) <= width
    for found in re.findall(r"coco[\w…-]*", out):
        assert re.fullmatch(r"coco\S*\d", found), out
        assert len(found) >= least, out


@WIDTHS
def test_inspect(storage_command, home: Path, at: int) -> None:
    run = publish(home / "run")
    code, out, _ = storage_command("inspect", run.output_dir, width=at)
    assert code == 0
    check_lines(out, at)
    assert "5 questions in 1 part" in out
    assert re.search(rf"│ {VISION} +│", out)
    code, out, _ = storage_command("inspect", run.part_path(1), width=at)
    assert code == 0
    check_lines(out, at)
    assert len(re.findall(r"^│ coco-\S+\d +│", out, re.MULTILINE)) == 5
    assert re.search(rf"│ {VISION} +│ +\[\d+\] +│ float32 +│", out)
    assert (" min ┃" in out) == (at == 120)
    whole = json.loads(storage_command("inspect", run.part_path(1), "--json")[1])
    assert list(whole["questions"]) == [long_id(n) for n in (0, 1, 3, 4, 5)]


@WIDTHS
def test_diff(storage_command, home: Path, at: int) -> None:
    first, second = publish(home / "first"), publish(home / "second", shift=0.5)
    code, out, _ = storage_command("diff", first.output_dir, second.output_dir, width=at)
    assert code == 1
    check_lines(out, at)
    assert re.search(rf"│ {VISION} +│ +0 │", out)
    assert ("cosine" in out) == (at == 120)
    assert out.count(f"│ {long_id(4)} │") >= 1  # among the worst
    assert "5 of 5 answers that differ" in out


@WIDTHS
def test_failures(home: Path, at: int, capsys: pytest.CaptureFixture[str]) -> None:
    from producer.commands.looking import status

    run = publish(home / "run")
    status(run.location, failed=True)
    out = capsys.readouterr().out
    check_lines(out, at, least=30)
    lines = out.splitlines()
    assert "1 failed" in lines
    assert f"{long_id(2)} · image_missing" in lines
    assert re.search(rf"{run.questions(1)[2].image_id} does not exist", " ".join(out.split()))
    status(run.location, failed=True, as_json=True)
    [failure] = json.loads(capsys.readouterr().out)["failures"]
    assert failure["question_id"] == long_id(2)
    assert failure["message"].startswith(f"{home}/run/images/train/")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("facts", [{}, {**GPU, "gpu": "NVIDIA H100 80GB HBM3"}])
def test_workers(width: int, facts: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    name = "extract-12345-gpu3@node-017.cluster.example"
    Console().print(workers_table([worker(name=name, model="Qwen/Qwen2.5-VL-7B-Instruct", done=123456, **facts)]))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert len(re.findall(r"^│", out, re.MULTILINE)) == 1, out  # one line: nothing is folded
    shown = re.search(r"│ (extract-\S+example) +│ ready +│", out)
    assert shown, out
    assert "123,456" in out
    assert ("97%" in out) == bool(facts)


def test_a_long_place_stands_on_a_line_of_its_own() -> None:
    console = Console()
    console.width = 40
    console.file = io.StringIO()
    console.print(Table("/short", "2 parts"))
    console.print(Table("/a/path/that/is/long/enough", "7 questions in 2 parts"))
    assert console.file.getvalue().splitlines() == ["/short: 2 parts", "/a/path/that/is/long/enough",
                                                    "7 questions in 2 parts"]  # fmt: skip


def test_what_is_cut() -> None:
    assert cut("abcdefghij", 10) == "abcdefghij"
    assert cut("abcdefghij", 7) == "abc…hij"
    assert cut("abcdefghij", 1) == "…"
    assert all(cell_len(cut("画" * 30, width)) <= width for width in range(1, 61))
    console = Console()
    console.width = 12
    console.file = io.StringIO()
    console.print(Name("a\x1b[31m\nb"))
    console.print(Sentence("the file /a/very/long/path.png is gone"))
    shown = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert shown == ["a\\x1b[…\\x0ab", "the file", "/a/ver…h.png", "is gone"]
