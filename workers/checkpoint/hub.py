"""A model of the hub on this machine: in which cache it lies. Asks no network."""

from __future__ import annotations

from pathlib import Path

OWN_CACHE = Path("model_cache")


def cache_of(model: str, revision: str, given: str | Path | None = None) -> str:
    """Return the cache directory that a hub model is loaded from, or into.

    The one that is given; else `./model_cache` or the hub's own (`HF_HUB_CACHE`, `HF_HOME`, `~/.cache/huggingface`), whichever
    holds the revision; else `./model_cache`.
    """
    if given is not None:
        return str(given)
    from huggingface_hub import constants  # with what it imports a tenth of a second, for which no `--help` waits

    caches = (OWN_CACHE, Path(constants.HF_HUB_CACHE))
    return str(next((cache for cache in caches if _config(cache, model, revision)), OWN_CACHE))


def config_of(model: str, revision: str) -> Path | None:
    """Return the config.json of a local checkpoint, or of a hub model that is on this machine; None where it is not here."""
    if Path(model).is_dir():
        return Path(model) / "config.json"
    return _config(Path(cache_of(model, revision)), model, revision)


def _config(cache: Path, model: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", cache, revision)
    except ValueError:  # a directory's path, or no name at all
        return None
    return Path(found) if isinstance(found, str) else None
