"""The images of a run: which file or object an image id names, and its bytes. It decodes none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from storage.errors import UserError
from storage.images.opening import open_regular, read_bounded, too_large
from storage.stores.location import is_url, is_within, join, resolve_location, split_url

EMBEDDED = ".run/images"  # where a run keeps images that lay in its table, each by its content
_LOOKS = 5  # at a path of which links change meanwhile


class OutsideRootError(ValueError):
    """An image id names nothing inside the images directory or a further root."""


def resolve_image(image_id: str, images_dir: str | Path, image_roots: Sequence[str | Path]) -> str:
    """Return the location of an image: an absolute path, symbolic links followed, or a URL; nothing need be there.

    `images_dir` and `image_roots` are resolved locations: a root that is itself a link would admit nothing. Raises
    OutsideRootError where the id leaves all of them, by `..`, as an absolute path or URL or through a link, or can be none;
    OSError where links change all the while.
    """
    try:
        location = _locate(image_id, str(images_dir))
    except (ValueError, UserError) as error:  # NUL, or a character that the file system's encoding lacks
        raise OutsideRootError(f"{image_id!r} cannot be the name of a file") from error
    if not any(is_within(location, str(root)) for root in (images_dir, *image_roots)):
        raise OutsideRootError(f"{image_id!r} is {location}")
    return location


def _locate(image_id: str, images_dir: str) -> str:
    if is_url(image_id):
        return resolve_location(image_id)
    if is_url(images_dir) and not os.path.isabs(image_id):
        if "\0" in image_id:
            raise ValueError("embedded null byte")
        image_id.encode()
        bucket, prefix = split_url(images_dir)
        return join(bucket, os.path.normpath(f"/{prefix}/{image_id}").lstrip("/"))
    path = os.path.join(images_dir, image_id)
    for _ in range(_LOOKS - 1):
        # A link that goes away between `lstat` and `readlink` raises what a missing one does not (Python 3.11 to 3.13).
        with suppress(OSError):
            return os.path.realpath(path)
    return os.path.realpath(path)


def read_image(location: str, limit: int) -> bytes:
    """Return the bytes at what `resolve_image` returned.

    Raises OSError: EFBIG above `limit` bytes, ObjectStoreError, and what `open_regular` raises.
    """
    if is_url(location):
        from storage.stores.object_store import ObjectStore

        bucket, key = split_url(location)
        data = ObjectStore(bucket).get_bounded(key, limit)
        if data is None:
            raise too_large(limit)
        return data
    descriptor = open_regular(location)
    try:
        return read_bounded(descriptor, limit)
    finally:
        os.close(descriptor)


@contextmanager
def image_handle(location: str, limit: int) -> Iterator[tuple[int, tuple[int | str, ...]]]:
    """Yield a handle on an image's file, or on a copy in memory of its object, and what changes with its content.

    Raises what `read_image` does.
    """
    if is_url(location):
        data = read_image(location, limit)
        with open(os.memfd_create("image", os.MFD_CLOEXEC), "r+b") as memory:
            memory.write(data)
            memory.flush()
            yield memory.fileno(), (sha256(data).hexdigest(),)
        return
    descriptor = open_regular(location)
    try:
        made = os.fstat(descriptor)
        yield descriptor, (made.st_dev, made.st_ino, made.st_size, made.st_mtime_ns, made.st_ctime_ns)
    finally:
        os.close(descriptor)


@contextmanager
def opened_image(location: str) -> Iterator[tuple[BinaryIO, int]]:
    """Yield an image's file, or its object as one, and its length. Raises what `read_image` does; so does reading."""
    if is_url(location):
        from storage.stores.object_file import open_image

        yield open_image(location)
        return
    with open(open_regular(location), "rb") as file:
        yield file, os.fstat(file.fileno()).st_size
