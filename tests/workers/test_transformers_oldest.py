"""The engine gives the same numbers on the oldest supported transformers: its own tests, run in a second environment.

The environment shares torch and everything else with this one; only transformers, and what it pins, come before.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environments import python_with
from tests.support.processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OLDEST = "4.57.1"
PINNED = (f"transformers=={OLDEST}", "tokenizers==0.22.1", "huggingface_hub==0.36.*")
ROOT = Path(__file__).parents[2]
RUN = (
    "tests/workers/test_engine.py", "tests/workers/test_generation.py", "tests/workers/test_prompt.py",
    "tests/workers/test_small_model.py", "tests/workers/test_soundness.py",
)  # fmt: skip


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of the second environment."""
    return python_with(tmp_path_factory.mktemp("oldest") / "venv", *PINNED)


def test_the_oldest_transformers_computes_the_same(oldest: Path) -> None:
    versions = "import transformers, torch; print(transformers.__version__, torch.__version__)"
    here = subprocess.run([sys.executable, "-c", versions], capture_output=True, text=True, check=True)
    there = subprocess.run([oldest, "-c", versions], capture_output=True, text=True, check=True, env=environment())
    assert there.stdout.split() == [OLDEST, here.stdout.split()[1]]
    result = subprocess.run(
        [oldest, "-m", "pytest", *RUN], capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    last = result.stdout.strip().splitlines()[-1]
    assert " passed" in last, last
    assert "skipped" not in last


def test_other_families_on_the_oldest_transformers(oldest: Path) -> None:
    """Those that it has. Commands are of the first environment."""
    chosen = ("tests/workers/test_families.py", "-k", "not run and not probed")
    result = subprocess.run(
        [oldest, "-m", "pytest", *chosen], capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    last = result.stdout.strip().splitlines()[-1]
    assert int(last.partition(" passed")[0]) > 50, last


def test_the_oldest_is_the_one_that_is_declared() -> None:
    minor = OLDEST.rpartition(".")[0]
    assert f'"transformers>={minor}"' in (ROOT / "pyproject.toml").read_text()
    assert f"transformers {minor}" in (ROOT / "README.md").read_text()
