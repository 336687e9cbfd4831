"""The oldest supported h5py reads what this one writes, bit by bit, and writes and reads by itself: in a second environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from storage.runs.pack import pack
from tests.support.builders import make_facts, make_questions, make_run, stage
from tests.support.environments import python_with
from tests.support.processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OLDEST = "3.11.0"
ROOT = Path(__file__).parents[2]
RUN = ("tests/storage/test_columns.py", "tests/storage/test_load.py")
# Every value of a file by bare h5py: name to dtype, shape, bytes; attributes by their repr.
DIGEST = """
import hashlib, json, sys, h5py
found = {"h5py": h5py.__version__}
def note(name, node):
    values = {}
    if isinstance(node, h5py.Dataset):
        value = node[()]
        values["value"] = value.decode() if isinstance(value, bytes) else hashlib.sha256(value.tobytes()).hexdigest()
        values["type"] = [str(node.dtype), node.shape]
    values |= {key: [str(getattr(v, "dtype", "")), v.tolist() if hasattr(v, "tolist") else v] for key, v in node.attrs.items()}
    found[name] = values
with h5py.File(sys.argv[1], "r") as file:
    note("/", file)
    for key in file:
        note(key, file[key])
        for field in ("question", "image_id", "answer", "ground_truth_answer"):
            note(f"{key}/{field}", file[key][field])
        file[key].visititems(lambda name, node: note(f"{key}/{name}", node))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of the second environment."""
    return python_with(tmp_path_factory.mktemp("oldest") / "venv", f"h5py=={OLDEST}")


def digest(python: Path | str, part: Path) -> dict[str, object]:
    done = subprocess.run(
        [python, "-c", DIGEST, part], capture_output=True, text=True, check=True, env=environment(), cwd=part.parent
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_oldest_h5py_reads_every_value(oldest: Path, tmp_path: Path) -> None:
    questions = make_questions(30, per_image=3, extra={"note": "日本\n%"})
    model = make_facts(hidden_size=3584, vision_hidden_size=1280)
    run = make_run(tmp_path, questions, model=model, checkpoint_interval=30)
    stage(run, 1, failed=[4])
    pack(run, 1)
    here, there = digest(sys.executable, run.part_path(1)), digest(oldest, run.part_path(1))
    assert there.pop("h5py") == OLDEST != here.pop("h5py")
    assert len(here) > 29 * 14
    assert there == here


def test_the_oldest_h5py_writes_and_reads(oldest: Path) -> None:
    # Its HDF5 crashes on one of the zeroed pages that a later one refuses: docs/reading.md says so.
    left_out = "not data_loader and not is_light and not isal_the_standard and not zeroed_page"
    command = [oldest, "-m", "pytest", *RUN, "-k", left_out]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    last = result.stdout.strip().splitlines()[-1]
    assert " passed" in last, last
    assert "skipped" not in last


def test_the_oldest_is_the_one_that_is_declared() -> None:
    minor = OLDEST.rpartition(".")[0]
    assert f'"h5py>={minor}"' in (ROOT / "pyproject.toml").read_text()
    assert f"h5py {minor}" in (ROOT / "docs" / "format.md").read_text()
