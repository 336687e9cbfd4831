"""The command line: from a table and options to a run, and its state.

From Python: `run`, `enqueue`, `status` (docs/notebook.ipynb). Each is imported when it is first used, so that the commands stay
light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from producer.api import Account, RunStoppedError, UserError, enqueue, run, status

__all__ = ["Account", "RunStoppedError", "UserError", "enqueue", "run", "status"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("producer.api"), name)
