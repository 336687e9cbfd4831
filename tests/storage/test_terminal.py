"""What a terminal gets to see of texts from outside: no command among them, and ordinary text as it is."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

import producer.cli
import storage
from producer.commands.common import print_failures
from storage.command_line import run_command
from storage.errors import UserError
from storage.question import Question
from storage.runs.pack import pack
from storage.screen.console import Console, Text
from storage.screen.terminal import echo, echo_json, guard_logs, one_line, visible
from storage.views.report import write_report
from tests.support.builders import make_failure, make_run, stage

OSC, CSI, C1, RTL = "\x1b]52;c;ZWNobw==\x1b\\", "\x1b[2J", "\x9b31m", "\u202egnp.exe"
HOSTILE = f"x{OSC}{CSI}{C1}{RTL}\r\b\x07\u2028\u2066\u200b\udce9[/b][red]"
ORDINARY = "日本語 é 👨‍👩‍👧 🎉 עברית \u200f!"
ROOT = Path(storage.__file__).parents[1]


def harmless(text: str) -> bool:
    return all(character.isprintable() or character in "\n\u200d\u200f" for character in text)


@given(st.text(st.characters()))
def test_no_control_character_is_left(text):
    shown = visible(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 or "\ud800" <= c <= "\udfff" for c in shown)
    assert visible(shown) == shown
    assert len(one_line(text).splitlines()) <= 1
    shown.encode()


def test_ordinary_text_stays_and_the_hidden_is_seen():
    assert visible(ORDINARY) == one_line(ORDINARY) == ORDINARY
    assert visible("a\tb\nc") == "a\tb\nc"
    assert one_line("a\nerror: b") == r"a\x0aerror: b"
    assert visible("\x1b\x9b\u202e\u2028\u200b\ufeff\udce9\r\x7f") == r"\x1b\x9b\u202e\u2028\u200b\ufeff\udce9\x0d\x7f"


def test_json_is_exact_and_ascii(capsys):
    body = {HOSTILE: "\x7f" + ORDINARY}
    echo_json(body)
    out = capsys.readouterr().out
    assert out.isascii() and out.rstrip("\n").isprintable()
    assert json.loads(out) == body


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_shows_everything_in_everything(monkeypatch, terminal):
    monkeypatch.setenv("TTY_COMPATIBLE" if terminal else "NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    console = Console()
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    table.add_row(Text.assemble((HOSTILE, "bold")))
    console.print(table, HOSTILE, Text(HOSTILE), ORDINARY)
    shown = file.getvalue()
    hidden = ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "\r", "\b", "\u2028")
    assert not [text for text in hidden if text in shown]
    assert "[/b][red]" in shown.replace("\n", "")
    assert ORDINARY in shown


def test_no_module_prints_by_itself():
    """`ruff` refuses `print` and rich's own console; here that nothing is let off but the tables, bars and styles."""
    allowed = {"Group", "box", "RenderableType", "ConsoleOptions", "RenderResult"}
    for path in [p for package in ("producer", "workers", "storage") for p in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in {"rich.console", "rich.text", "rich"}:
                assert {name.name for name in node.names} <= allowed, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path


def test_logs_of_every_logger_show_it(capsys):
    factory = logging.getLogRecordFactory()
    logger = logging.getLogger("of.somebody")
    handler = logging.StreamHandler(stream := io.StringIO())
    logger.addHandler(handler)
    try:
        guard_logs()
        logger.warning("task %s failed: %r", HOSTILE, {"x": 1})
        logger.warning("of %(name)s", {"name": HOSTILE})
        logger.warning("a line that lacks %s %s", HOSTILE)  # noqa: PLE1206  (some library's mistake)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logger.exception("it %s", "raised")
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    text = stream.getvalue()
    assert r"task x\x1b]52;c" in text and r"ValueError: x\x1b]52" in text and r"of x\x1b]" in text
    assert harmless(text)
    assert "Logging error" not in capsys.readouterr().err


@pytest.fixture
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what a command sets for its whole process."""
    factory, hook, show = logging.getLogRecordFactory(), sys.excepthook, warnings.showwarning
    yield
    logging.setLogRecordFactory(factory)
    sys.excepthook, warnings.showwarning = hook, show


@pytest.mark.parametrize("error", [UserError(HOSTILE), OSError(28, "full", HOSTILE), OSError(28, "full")])
def test_a_users_error_is_a_sentence_that_commands_nothing(capsys, undone, error):
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(command)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and harmless(err)
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError(HOSTILE), OSError(10, HOSTILE)])
def test_a_traceback_commands_nothing(capsys, undone, error):
    def command() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_command(command)
    sys.excepthook(caught.type, caught.value, caught.tb)
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and r"x\x1b]52" in err and harmless(err)


def test_a_warning_commands_nothing(capsys, undone):
    run_command(lambda: warnings.warn(HOSTILE, stacklevel=1))
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and harmless(err)


def hostile_run(directory: Path):
    rows = [Question(f"{HOSTILE[:-15]}{n}", f"{OSC}{n}.png", f"What {OSC}?", f"{C1}", n, {f"col{CSI}": OSC}) for n in range(3)]
    run = make_run(directory, rows)
    stage(run, 1, skipped={2})
    run.stage_failure(1, 2, make_failure(rows[2], message=f"{OSC}\nerror: forged", worker=f"w{CSI}"))
    assert pack(run, 1)
    return run


def test_commands_over_a_hostile_run(tmp_path, monkeypatch, capsys, storage_command):
    run = hostile_run(tmp_path / "a[/b] 12:30")
    part = run.part_path(1)
    for arguments in (
        ("inspect", part), ("inspect", run.location), ("verify", run.location, "--deep"), ("diff", run.location, part),
        ("inspect", part, "--question", f"no{OSC}"),
    ):  # fmt: skip
        _, out, err = storage_command(*arguments)
        assert harmless(out + err), arguments
        assert r"\x1b]52" in out + err or arguments[1] != part
    for arguments in (
        ("status", run.location),
        ("status", run.location, "--failed"),
        ("retry", run.location, "--id", OSC),
    ):
        monkeypatch.setattr(sys, "argv", ["producer", *arguments])
        monkeypatch.setenv("HALP_BROKER_URL", "redis://127.0.0.1:1/0")
        with pytest.raises(SystemExit):
            producer.cli.main()
        captured = capsys.readouterr()
        assert harmless(captured.out + captured.err), arguments
        assert "a[/b] 12:30" in captured.out + captured.err


def test_the_report_has_none_either(tmp_path):
    run = hostile_run(tmp_path / f"run{CSI}")
    page = Path(write_report(run)).read_bytes().decode()
    assert r"\x1b]52" in page and harmless(page.replace("\t", ""))


def test_a_failure_forges_no_line(tmp_path, capsys):
    from storage.runs.account import Bookkeeper

    run = hostile_run(tmp_path / "run")
    print_failures(run, Bookkeeper(run).account())
    assert "\nerror: forged" not in capsys.readouterr().err


def test_echo_goes_where_it_is_said(capsys):
    echo(f"a{CSI}", err=True)
    echo("b")
    assert capsys.readouterr() == ("b\n", "a\\x1b[2J\n")
