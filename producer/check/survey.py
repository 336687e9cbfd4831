"""The survey of a dataset's images: every file's size by its header, or by decoding it whole, many at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from producer.show.progress import Done, counted
from storage.evenly import spread
from storage.images.decoders import decoders
from storage.images.lookup import OutsideRootError, resolve_image
from storage.stores.location import is_url
from workers.errors import PermanentError, TransientError
from workers.extract.loading import Limits, image_header, load_image, smart_resize

_AT_ONCE, _MOST_BYTES = 256, 64 << 20  # images of a table that are looked at together
_TIMED = 32  # images that are decoded for the time it takes
_THREADS = min(32, 4 * (os.cpu_count() or 1))  # they wait for the disk, and decoders release the interpreter's lock


@dataclass(frozen=True, slots=True)
class ImageProblem:
    """Why an image's questions would fail: a reason as a run's failures have it, and a message."""

    image_id: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of the images: (width, height) of each good one, and the others' problems."""

    sizes: dict[str, tuple[int, int]]
    problems: tuple[ImageProblem, ...]
    file_bytes: int  # of the files on this machine
    decode_seconds: float | None  # of one core for one image: read, decoded and resized; None where none could be
    turned: tuple[str, ...]  # good images that are stored turned, by their EXIF data

    def pixels(self) -> list[int]:
        """Return the good images' numbers of pixels."""
        return [width * height for width, height in self.sizes.values()]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where a run's images are and how they are read."""

    images_dir: str  # a resolved location, as are the roots
    roots: tuple[str, ...]
    limits: Limits
    factor: int | None  # None: the model's processor sizes images
    halp_compat: bool
    exif_rotation: bool

    def place(self, image_id: str) -> str:
        """Return an image's location. Raises OutsideRootError."""
        return resolve_image(image_id, self.images_dir, self.roots)

    def decode(self, image_id: str) -> tuple[int, int]:
        """Decode and resize an image as a worker does; return its size. Raises PermanentError, TransientError."""
        image = load_image(
            self.place(image_id),
            self.factor,
            self.limits,
            halp_compat=self.halp_compat,
            exif_rotation=self.exif_rotation,
        )
        return image.original_size

    def tokens(self, size: tuple[int, int], most: int | None = None) -> int | None:
        """Return the vision tokens of an image of a size, within these pixel limits or up to another; None: not known here."""
        (width, height), least = size, self.limits[0]
        most = most or self.limits[1]
        if self.factor is None or least is None or most is None:
            return None
        resized_height, resized_width = smart_resize(height, width, self.factor, least, most)
        return resized_height * resized_width // self.factor**2


def survey_embedded(gallery: ImageSource, images: Iterable[tuple[str, bytes]], *, decode: bool, done: Done) -> Survey:
    """Look at images that lie in a table, some at a time as files in the gallery's directory."""
    found: list[Survey] = []
    looked_at = 0
    for chunk in _chunks(images):
        write_files(gallery.images_dir, chunk)
        names = [name for name, _ in chunk]
        found.append(survey(gallery, names, decode=decode, done=lambda _: None, timed=not found))
        looked_at += len(chunk)
        done(looked_at)
        for name in names:
            os.unlink(os.path.join(gallery.images_dir, name))
    sizes = {name: size for one in found for name, size in one.sizes.items()}
    problems, turned = ([item for one in found for item in getattr(one, which)] for which in ("problems", "turned"))
    seconds = found[0].decode_seconds if found else None
    return Survey(sizes, tuple(problems), sum(one.file_bytes for one in found), seconds, tuple(turned))


def write_files(directory: str, images: Iterable[tuple[str, bytes]]) -> None:
    """Write images below a directory that is of this process alone."""
    for name, data in images:
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _chunks(images: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    chunk: list[tuple[str, bytes]] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == _AT_ONCE or sum(len(data) for _, data in chunk) > _MOST_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def survey(gallery: ImageSource, image_ids: Sequence[str], *, decode: bool, done: Done, timed: bool = True) -> Survey:
    """Look at each image; `done` is told after each how many were. `timed`: measure too how long decoding takes."""
    sizes: dict[str, tuple[int, int]] = {}
    problems, all_turned = [], []

    def look(image_id: str) -> tuple[tuple[int, int], int, bool] | ImageProblem:
        try:
            place = gallery.place(image_id)
            size, turned = image_header(place, exif_rotation=gallery.exif_rotation)
            if decode:
                size = gallery.decode(image_id)
            return size, 0 if is_url(place) else os.path.getsize(place), turned
        except OutsideRootError as error:
            return ImageProblem(image_id, "image_outside_root", str(error))
        except PermanentError as error:
            return ImageProblem(image_id, error.reason, error.message)
        except (TransientError, OSError) as error:
            return ImageProblem(image_id, "transient_error", str(error))

    file_bytes = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for image_id, found in counted(zip(image_ids, pool.map(look, image_ids)), done, step=1):
                if isinstance(found, ImageProblem):
                    problems.append(found)
                else:
                    sizes[image_id], number, is_turned = found
                    file_bytes += number
                    all_turned += [image_id] * is_turned
        except KeyboardInterrupt:
            decoders.end(0)  # or the pool would wait for the slowest image
            raise
    seconds = _decode_seconds(gallery, list(sizes)) if timed else None
    return Survey(sizes, tuple(problems), file_bytes, seconds, tuple(all_turned))


def _decode_seconds(gallery: ImageSource, image_ids: Sequence[str]) -> float | None:
    """Time one core on images spread evenly over the dataset. What cannot be decoded after all does not count.

    On the wall clock: some formats are decoded in another process, and nothing else is done here meanwhile.
    """
    seconds, decoded = 0.0, 0
    for image_id in spread(image_ids, _TIMED):
        begun = time.perf_counter()
        try:
            gallery.decode(image_id)
        except (PermanentError, TransientError):
            continue
        seconds += time.perf_counter() - begun
        decoded += 1
    return seconds / decoded if decoded else None
