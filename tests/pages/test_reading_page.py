"""Every snippet of docs/reading.md does what it says, in order, in a directory with two runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from storage.runs.pack import pack
from tests.support.builders import make_facts, make_questions, make_run, stage
from tests.support.processes import command, environment

PAGE = (Path(__file__).parents[2] / "docs" / "reading.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with two finished runs of forty questions, whose layers are those of the page."""
    path = tmp_path_factory.mktemp("page")
    model = make_facts(num_hidden_layers=28, layers=(0, 7, 14, 21, 27))
    for name in ("output", "output-exact"):
        run = make_run(path / name, make_questions(40), model=model, checkpoint_interval=15)
        for piece in run.slices:
            stage(run, piece.part)
            pack(run, piece.part)
    return path


def test_there_are_snippets() -> None:
    assert len(PYTHON) == 4
    assert len(COMMANDS) == 7


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_a_python_snippet_runs(directory: Path, number: int) -> None:
    code = PYTHON[number]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=directory, env=environment(),
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if number == 0:
        assert done.stdout.startswith("(40, 8) float32\n")
        assert "answer to q1" in done.stdout


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs(directory: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(directory)
    result = command(*shlex.split(line))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout
