"""Tie a process's life to its parent's, so that nothing outlives a parent that was killed."""

from __future__ import annotations

import ctypes
import os
import signal

PARENT_VARIABLE = "HALP_PARENT_PID"

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, even by SIGKILL.

    The kernel watches the parent's *thread* that made this process: make it from one that lasts. Linux only; elsewhere the
    process ends when it next uses the closed connection.
    """
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def die_with_named_parent() -> None:
    """Do the same for the parent that `HALP_PARENT_PID` names, if it names one; its children are not tied to it in turn."""
    if parent := os.environ.pop(PARENT_VARIABLE, None):
        die_with_parent(int(parent))
