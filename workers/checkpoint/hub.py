"""A model of the hub on this machine: in which cache it lies. Asks no network, and loads no library of the hub's."""

from __future__ import annotations

import os
from pathlib import Path

OWN_CACHE = Path("model_cache")


def cache_of(model: str, given: str | Path | None = None) -> str:
    """Return the cache directory that a hub model is loaded from, or into.

    The one that is given; else `./model_cache` or the hub's own (`HF_HUB_CACHE`, `HF_HOME`, `~/.cache/huggingface`), whichever
    holds the model; else `./model_cache`.
    """
    if given is not None:
        return str(given)
    return str(next((cache for cache in (OWN_CACHE, hub_cache()) if _holds(cache, model)), OWN_CACHE))


def hub_cache() -> Path:
    """Return the hub library's own cache directory, by the variables that it goes by."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if place := os.environ.get(name):
            return Path(os.path.expandvars(place)).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def _holds(cache: Path, model: str) -> bool:
    snapshots = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    return any(snapshots.glob("*/config.json"))
