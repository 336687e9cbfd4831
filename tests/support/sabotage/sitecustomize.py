"""Sabotage from outside: with this directory on PYTHONPATH, a process of ours dies or errs where its environment says.

The code under test has no hooks for it. Python imports this module before any other; without a `SABOTAGE_` variable it does
nothing.

SABOTAGE_KILL_AT=POINT:N   SIGKILL itself at the N-th time that it comes to a point of `POINTS`
SABOTAGE_STOP_AT=POINT:N   SIGSTOP itself there
SABOTAGE_LOG=FILE          where it writes the point before it dies
SABOTAGE_FLAKY=DIRECTORY   the first read of each image whose name begins with `flaky` is an I/O error, once for all processes
SABOTAGE_CLOCK=SECONDS     its clock is so far ahead, or behind
"""

from __future__ import annotations

import datetime
import errno
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

# Point: (function of `os`, pattern of its path inside the run directory, before or after the call). What stands in a path's
# last place is the object that is made, replaced or removed.
POINTS = {
    "stage.before": ("link", r"\.run/staging/\d+/\d+\.\w+$", "before"),
    "stage.after": ("link", r"\.run/staging/\d+/\d+\.\w+$", "after"),
    "publish.before": ("link", r"_part_\d+\.h5$", "before"),
    "publish.after": ("link", r"_part_\d+\.h5$", "after"),
    "describe.before": ("link", r"\.run/parts/\d+\.json$", "before"),
    "describe.after": ("link", r"\.run/parts/\d+\.json$", "after"),
    "clean.before": ("unlink", r"\.run/staging/\d+/0*1\.\w+$", "before"),
    "clean.middle": ("unlink", r"\.run/staging/\d+/0*7\.\w+$", "after"),
    "clean.last": ("rmdir", r"\.run/staging/\d+$", "before"),
    "plan.before": ("link", r"\.run/plan/00[1-9]\.json$", "before"),
    "plan.after": ("link", r"\.run/plan/00[1-9]\.json$", "after"),
    "failures.before": ("replace", r"failures\.csv$", "before"),
    "finish.before": ("replace", r"\.run/summary\.json$", "before"),
    "finish.after": ("replace", r"\.run/summary\.json$", "after"),
    "take.before": ("link", r"\.merging/[^/]*_part_\d+\.h5$", "before"),
    "take.after": ("link", r"\.merging/[^/]*_part_\d+\.h5$", "after"),
    "merge.before": ("rename", r"/out$", "before"),
    "merge.after": ("rename", r"/out$", "after"),
}


def strike_at(point: str, times: int, strike: signal.Signals, log: str) -> None:
    """Have the process send itself a signal at a point."""
    name, pattern, moment = POINTS[point]
    call: Callable[..., Any] = getattr(os, name)
    left = times

    def come(path: str) -> None:
        nonlocal left
        if re.search(pattern, path):
            left -= 1
            if left == 0:
                with open(log, "a") as file:
                    file.write(f"{point} {os.getpid()}\n")
                os.kill(os.getpid(), strike)

    def sabotaged(*arguments: Any, **options: Any) -> Any:
        path = os.fspath(arguments[-1])
        if (handle := options.get("dst_dir_fd", options.get("dir_fd"))) is not None:
            path = f"{os.readlink(f'/proc/self/fd/{handle}')}/{path}"
        if moment == "before":
            come(path)
        result = call(*arguments, **options)
        if moment == "after":
            come(path)
        return result

    setattr(os, name, sabotaged)


def fail_first_reads(directory: str) -> None:
    """Make the first read of each flaky image an I/O error."""
    read = os.read

    def sabotaged(descriptor: int, length: int) -> bytes:
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            path = ""
        if os.path.basename(path).startswith("flaky"):
            try:
                open(os.path.join(directory, os.path.basename(path)), "x").close()
            except FileExistsError:
                pass
            else:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read(descriptor, length)

    os.read = sabotaged  # type: ignore[assignment]


def shift_clock(seconds: float) -> None:
    """Shift the wall clock; the monotonic one stays."""
    now, offset = time.time, datetime.timedelta(seconds=seconds)
    time.time = lambda: now() + seconds

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + offset

        @classmethod
        def utcnow(cls) -> Any:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    datetime.datetime = Datetime  # type: ignore[misc]


for variable, strike in (("SABOTAGE_KILL_AT", signal.SIGKILL), ("SABOTAGE_STOP_AT", signal.SIGSTOP)):
    if at := os.environ.get(variable):
        strike_at(at.partition(":")[0], int(at.partition(":")[2]), strike, os.environ.get("SABOTAGE_LOG", os.devnull))
if flaky := os.environ.get("SABOTAGE_FLAKY"):
    fail_first_reads(flaky)
if clock := os.environ.get("SABOTAGE_CLOCK"):
    shift_clock(float(clock))
