"""Runs from Python: an account, or an exception; nothing is left behind in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from PIL import Image

import producer
from producer.api import _options
from producer.dataset.table import Source, read_table
from storage.errors import UserError
from tests.producer.test_forms import ROWS, as_csv, hub_rows, told
from tests.support.processes import with_word
from workers.settings import settings

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    for name, colour in (("a.png", "red"), ("b.jpg", "green"), ("c.webp", "blue")):
        Image.new("RGB", (80, 60), colour).save(directory / name)
    return directory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake engine, in the processes that a run starts too."""
    monkeypatch.setenv("HALP_ENGINE", "fake:0")
    settings.cache_clear()


def frame_of(images: Path) -> pd.DataFrame:
    return pd.DataFrame(hub_rows(images), index=[9, 9, 9, 9])


def test_a_frame_is_as_its_csv(images: Path, tmp_path: Path) -> None:
    """What pandas takes for missing is empty; the digest is of the content."""
    source = Source(Path("frame"), frame=frame_of(images))
    table = read_table(source)
    assert told(table) == told(read_table(as_csv(tmp_path / "t.csv", images)))
    assert len(table.embedded) == 3
    assert read_table(source) == table
    other = frame_of(images).assign(answer=[None, float("nan"), pd.NA, "x"])
    assert [q.ground_truth_answer for q in read_table(Source(Path("frame"), frame=other)).questions] == ["", "", "", "x"]
    assert read_table(Source(Path("frame"), frame=other)).sha256 != table.sha256


@pytest.mark.slow
def test_a_run_and_its_resumption(images: Path, tmp_path: Path, small_model: Path, quick: None, capsys: Any) -> None:
    before = dict(os.environ)
    frame = pd.DataFrame(ROWS, columns=["id", "image", "question", "answer"])
    asked: dict[str, Any] = {"output_dir": tmp_path / "o", "images_dir": images, "model": small_model, "layers": [0, 2]}
    account = producer.run(frame, **asked)
    assert (account.planned, account.written, account.failed, account.finished) == (4, 4, 0, True)
    assert "questions: 100%" in capsys.readouterr().err
    assert producer.run(frame, **asked, progress=False) == account
    assert capsys.readouterr().err.count("%") == 0
    assert producer.status(tmp_path / "o") == account
    assert dict(os.environ) == before
    assert not with_word(str(tmp_path))


@pytest.mark.slow
def test_a_failed_question_is_no_exception(images: Path, tmp_path: Path, small_model: Path, quick: None) -> None:
    frame = pd.DataFrame([*ROWS, ("21", "gone.png", "What?", "")], columns=["id", "image", "question", "answer"])
    account = producer.run(
        frame, output_dir=tmp_path / "o", images_dir=images, model=small_model, allow_missing=True, progress=False
    )
    assert (account.written, account.failed, account.reasons) == (4, 1, {"image_missing": 1})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_new_token": 3}, r"there is no option 'max_new_token': did you mean max_new_tokens\?"),
        ({"vqa_dataset": "x.csv"}, "there is no option 'vqa_dataset'"),
        ({"max_new_tokens": -1}, "max_new_tokens: Input should be greater than or equal to 0"),
        ({"dtype": "float16"}, "dtype: Input should be 'bfloat16' or 'float32'"),
        ({"layers": "x"}, "--layers x: give layers' numbers"),
        ({"layers": [99]}, "99"),
        ({"images_dir": "/nowhere"}, "--images-dir /nowhere does not exist"),
        ({"images_dir": None}, "--images-dir is missing"),
        ({"columns": {"what": "x"}}, "--columns 'what=x'"),
        ({"prompt": "no place"}, "has no {question}"),
    ],
)
def test_a_mistake_is_an_exception(
    options: dict[str, Any], reason: str, images: Path, tmp_path: Path, small_model: Path, quick: None
) -> None:
    asked = {"output_dir": tmp_path / "o", "images_dir": images, "model": small_model, "progress": False} | options
    frame = pd.DataFrame(ROWS, columns=["id", "image", "question", "answer"])
    with pytest.raises(UserError, match=reason):
        producer.run(frame, **asked)
    assert not (tmp_path / "o").exists()


def test_a_faulty_frame_names_its_rows(images: Path, tmp_path: Path, small_model: Path) -> None:
    frame = frame_of(images).assign(question=["What?", "", None, "3"])
    with pytest.raises(UserError, match="3 faulty rows\n  row 2: the question is blank") as caught:
        producer.run(frame, output_dir=tmp_path / "o", model=small_model, progress=False)
    assert "row 4: question_not_text" in str(caught.value)


def test_a_broker_that_is_not_there(images: Path, tmp_path: Path, small_model: Path) -> None:
    """The run is planned; the exception says how it goes on."""
    code = (
        "import sys, producer\n"
        "table, output, images, model = sys.argv[1:]\n"
        "try: producer.enqueue(table, output_dir=output, images_dir=images, model=model, progress=False)\n"
        "except producer.UserError as error: print(error)\n"
        "print(producer.status(output).outstanding)"
    )
    call = [sys.executable, "-c", code, as_csv(tmp_path / "t.csv", images), tmp_path / "o", images, small_model]
    environment = os.environ | {"HALP_BROKER_URL": "redis://127.0.0.1:1/0"}
    result = subprocess.run([*map(str, call)], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.stdout.startswith("cannot reach the broker redis://"), result.stderr
    assert result.stdout.endswith("\n4\n")


def test_the_command_line_names_the_same_options() -> None:
    options = _options("t.csv", "o", {"layers": 3, "image_root": "/x", "images_dir": Path("/y")})
    assert (options.computation.layers, options.image_roots, options.images_dir) == ((3,), ("/x",), "/y")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """As it stands, in a kernel of its own; its outputs are those that its text speaks of."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # nobody's machine is committed
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = ["".join(str(output) for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert "written=4" in shown[5]
    assert "(4, 128) float32" in shown[6] or "float32" in shown[6]
    assert "2 faulty rows" in shown[8]
    assert not (tmp_path / "another-output").exists()
