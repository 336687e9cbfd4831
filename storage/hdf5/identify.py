"""A look into a file that may be damaged: in a process of its own, because HDF5 can hang for ever on one, or crash.

A zeroed page in the heap of strings makes it walk in a circle, within one call that no thread and no signal handler ends. The
process costs 0.2 s, so it is for files of which nothing is known: a published part has a sidecar.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Literal

from storage.command_line import child_environment
from storage.errors import DamagedError, LayoutError, NotReadError
from storage.hdf5.part import read_header
from storage.screen.terminal import echo_json

Verdict = Literal["ours", "damaged", "foreign"]
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNREADABLE, _NO_PART = 3, 4  # exit codes of the process
_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE}
_TIMEOUT = 60.0  # seconds; a sound part of 1000 questions takes 0.01, on a bad day of a shared directory some


def identify_part(path: Path, run_id: str, part: int, origin: tuple[str, int] | None = None) -> Verdict:
    """Tell whose a file is that has the name of a run's part: by its own word, where HDF5 can read it.

    origin: of a merged run, the run and number that the part was published as.

    One that it cannot read is damaged if it begins as HDF5 files do, or with the zeros or the nothing that a crash of the
    machine leaves. Anything else is foreign: it was never a part. Raises NotReadError where the process ended
    for another reason.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return "foreign"
    if not stat.S_ISREG(status.st_mode):
        return "foreign"
    return _whose(path.absolute(), frozenset({(run_id, part), origin or (run_id, part)}), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)  # a collector asks at each sweep until somebody acts
def _whose(path: Path, ours: frozenset[tuple[str, int]], _size: int, _changed: int) -> Verdict:
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(  # -P: a module in the working directory, which others may write to, is not imported
            [sys.executable, "-P", "-m", "storage.hdf5.identify", path],
            capture_output=True, timeout=_TIMEOUT, check=False, env=child_environment({**os.environ, "PYTHONPATH": search}),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "damaged" if _was_hdf5(path) else "foreign"
    if done.returncode == _UNREADABLE or done.returncode in _CRASHES:
        return "damaged" if _was_hdf5(path) else "foreign"
    if done.returncode == _NO_PART:
        return "foreign"
    if done.returncode:  # out of memory, an unreadable disk: it says nothing of the file
        raise NotReadError(
            errno.EIO,
            f"cannot look into {path}: the process that reads it ended with exit code {done.returncode}; try again. "
            f"{done.stderr.decode(errors='replace').strip()[-500:]}",
        )
    found = json.loads(done.stdout)
    return "ours" if found is not None and tuple(found) in ours else "foreign"


def _was_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        begin = file.read(len(_SIGNATURE))
    return _SIGNATURE.startswith(begin) or not any(begin)


def main(path: str) -> None:
    """Print the run and the part that a file says it is of; fail where it cannot be read."""
    try:
        header = read_header(Path(path))
    except LayoutError:
        raise SystemExit(_NO_PART) from None
    except (DamagedError, ValueError, TypeError):
        raise SystemExit(_UNREADABLE) from None
    echo_json(header and [header.run_id, header.part])


if __name__ == "__main__":
    main(sys.argv[1])
