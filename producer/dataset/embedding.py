"""Images that lie in a table: written once into the run, by their content, before the plan names them."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from producer.dataset.table import Source, embedded_images
from producer.show.progress import Phases, silent
from storage.errors import UserError
from storage.images.lookup import EMBEDDED
from storage.runs.run import Run, is_run
from storage.stores.location import is_url, resolve_location
from storage.stores.store import open_store

_THREADS, _AHEAD = 8, 16  # they wait for a disk's flush or an object store; images that are in memory for it
_SPARE = 64 << 20  # bytes that a disk must have beside the images


def write_images(run: Run, source: Source, images: Collection[str], phases: Phases = silent) -> None:
    """Write those of a table's images into a run that are not there. Raises UserError, OSError."""
    missing = set(images) - _there(run.location)
    if not missing:
        return
    done = phases("writing images", len(missing))
    writing: deque[Future[bool]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for key, data in embedded_images(source, missing, done):
            writing.append(pool.submit(run.store.put_new, key, data))
            if len(writing) > _AHEAD:
                writing.popleft().result()
        while writing:
            writing.popleft().result()


def refuse_without_room(output_dir: str, images: Mapping[str, int]) -> None:
    """Raise UserError where a disk has no room for those images, with their bytes, that are not there yet."""
    location = resolve_location(output_dir)
    if is_url(location) or not images:
        return
    there = _there(location) if is_run(location) else set()
    needed = sum(size for key, size in images.items() if key not in there)
    place = next(place for place in (Path(location), *Path(location).parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    if needed and needed + _SPARE > free:
        raise UserError(
            f"--output-dir {output_dir}: the table's images take {needed >> 20:,} MB there, and {free >> 20:,} MB are free: "
            "make room, or choose another --output-dir"
        )


def _there(location: str) -> set[str]:
    return {f"{EMBEDDED}/{name}" for name in open_store(location).list(EMBEDDED)}
