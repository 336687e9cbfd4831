"""A second Python environment that shares everything with this one but a few packages of other versions."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


def python_with(directory: Path, *requirements: str) -> Path:
    """Return the Python of a new environment with these packages. Without the package registry: skip, in CI fail."""
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))
    # Not the path alone: its own .pth files count too, as those of an editable installation.
    (own / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    result = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", *requirements],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    if result.returncode:
        reason = f"{', '.join(requirements)} cannot be installed: {(result.stderr.strip().splitlines() or ['?'])[-1]}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return python
