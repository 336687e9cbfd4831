"""A look into a file that may be damaged: in a process of its own, because HDF5 can hang for ever on one, or crash.

A zeroed page in the heap of strings makes it walk in a circle, within one call that no thread and no signal handler ends. The
process costs 0.2 s, so it is for files of which nothing is known: a published part has a sidecar.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from storage.part import read_header

Verdict = Literal["ours", "damaged", "foreign"]
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_TIMEOUT = 60.0  # seconds; a sound part of 1000 questions takes 0.01, on a bad day of a shared directory some


def whose(path: Path, run_id: str, part: int) -> Verdict:
    """Tell whose a file is that has the name of a run's part: by its own word, where HDF5 can read it.

    One that it cannot read is damaged if it begins as HDF5 files do, or with the zeros or the nothing that a crash of the
    machine leaves. Anything else is foreign: it was never a part.
    """
    root = str(Path(__file__).parents[1])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "storage.probe", path.absolute()],
            capture_output=True, timeout=_TIMEOUT, check=True, env={**os.environ, "PYTHONPATH": search},
        )  # fmt: skip
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return "damaged" if _was_hdf5(path) else "foreign"
    return "ours" if json.loads(done.stdout) == [run_id, part] else "foreign"


def _was_hdf5(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begin = file.read(len(_SIGNATURE))
    return _SIGNATURE.startswith(begin) or not any(begin)


def main(path: str) -> None:
    """Print the run and the part that a file says it is of; fail where it cannot be read."""
    header = read_header(Path(path))
    print(json.dumps(header and [header.run_id, header.part]))


if __name__ == "__main__":
    main(sys.argv[1])
