"""The images of a run: which file or object an image id names. It reads no pixels and does not ask whether it is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from storage.errors import UserError
from storage.location import is_url, is_within, join, resolve_location, split_url


class OutsideRootError(ValueError):
    """An image id names nothing inside the images directory or a further root."""


def resolve_image(image_id: str, images_dir: str | Path, image_roots: Sequence[str | Path]) -> str:
    """Return the location of an image: an absolute path, symbolic links followed, or a URL; nothing need be there.

    `images_dir` and `image_roots` are resolved locations: a root that is itself a link would admit nothing. Raises
    OutsideRootError where the id leaves all of them, by `..`, as an absolute path or URL or through a link, or can be none.
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
    return os.path.realpath(os.path.join(images_dir, image_id))
