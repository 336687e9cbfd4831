"""The edge of every command: its errors and warnings as people read them, and the environment of the processes it starts."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import TracebackType
from typing import Annotated

import typer

from storage.errors import DamagedError, UserError
from storage.screen.terminal import echo, guard_logs
from storage.stores.space import reason

PROJECT = "halp-extractor"
# What a file system says of itself; other errors of the system are our own mistakes, and have a traceback.
_OF_THE_PLACE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


def _show_version(asked: bool) -> None:
    if asked:
        echo(f"{PROJECT} {version(PROJECT)}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and end.")]


def run_command(command: Callable[[], object]) -> None:
    """Run a command line; a user's mistake, or a place that cannot be written, is one message and exit code 2."""
    warnings.showwarning = lambda message, *_: echo(f"warning: {message}", err=True)
    guard_logs()
    if hasattr(sys.stdout, "reconfigure"):  # a terminal of another encoding than UTF-8 shows what it lacks as escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
    except (UserError, DamagedError) as error:
        echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in _OF_THE_PLACE:
            sys.excepthook = _show
            raise
        echo(f"error: {reason(error)}", err=True)
        raise SystemExit(2) from None
    except Exception:
        sys.excepthook = _show  # here, since typer sets its own
        raise


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback: Python would print the error's text as it is."""
    echo("".join(traceback.format_exception(kind, error, trace)).rstrip(), err=True)


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a Python process of ours: it imports no module that lies in the working directory.

    An empty or relative entry of PYTHONPATH would be such a place: it is left out.
    """
    kept = {**environment, "PYTHONSAFEPATH": "1"}
    if "PYTHONPATH" in kept:
        kept["PYTHONPATH"] = os.pathsep.join(filter(os.path.isabs, kept["PYTHONPATH"].split(os.pathsep)))
    return kept
