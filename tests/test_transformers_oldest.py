"""The engine gives the same numbers on the oldest supported transformers: its own tests, run in a second environment.

The environment shares torch and everything else with this one; only transformers, and what it pins, come before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from processes import environment

OLDEST = "4.57.1"
PINNED = (f"transformers=={OLDEST}", "tokenizers==0.22.1", "huggingface_hub==0.36.*")
ROOT = Path(__file__).parent.parent
RUN = ("tests/test_engine.py", "tests/test_prompt.py", "tests/test_small_model.py")


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of the second environment. Without the package registry: skip, in CI fail."""
    directory = tmp_path_factory.mktemp("oldest") / "venv"
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    result = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", *PINNED], capture_output=True, text=True, timeout=200, check=False
    )
    if result.returncode:
        reason = f"transformers {OLDEST} cannot be installed: {(result.stderr.strip().splitlines() or ['?'])[-1]}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return python


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
    assert " passed in " in last, last
    assert "skipped" not in last


def test_the_oldest_is_the_one_that_is_declared() -> None:
    minor = OLDEST.rpartition(".")[0]
    assert f'"transformers>={minor}"' in (ROOT / "pyproject.toml").read_text()
    assert f"transformers {minor}" in (ROOT / "README.md").read_text()
