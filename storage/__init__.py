"""A run's directory: plan, staging, parts, failures, and the HDF5 layout. Knows nothing of queues or models.

For readers: `load`, `load_frame`, `iter_chunks`, `iter_samples`, `torch_dataset` (docs/reading.md). Each is imported when it
is first used, so that `import storage` and the commands stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.errors import DamagedError, UnfinishedWarning, UserError
    from storage.reading.load import Loaded, StoredSample, iter_chunks, iter_samples, load, load_frame
    from storage.reading.torch_adapter import torch_dataset

_HOMES = {
    "load": "storage.reading.load",
    "load_frame": "storage.reading.load",
    "iter_chunks": "storage.reading.load",
    "iter_samples": "storage.reading.load",
    "Loaded": "storage.reading.load",
    "StoredSample": "storage.reading.load",
    "torch_dataset": "storage.reading.torch_adapter",
    "UserError": "storage.errors",
    "DamagedError": "storage.errors",
    "UnfinishedWarning": "storage.errors",
}
__all__ = [
    "DamagedError", "Loaded", "StoredSample", "UnfinishedWarning", "UserError", "iter_chunks", "iter_samples", "load",
    "load_frame", "torch_dataset",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
