"""The images of a run: which file an image id names. It reads no pixels and does not ask whether the file is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class OutsideRootError(ValueError):
    """An image id names no file inside the images directory or a further root."""


def resolve_image(image_id: str, images_dir: Path, image_roots: Sequence[Path]) -> Path:
    """Return the absolute path of an image, symbolic links followed; the file need not exist.

    `images_dir` and `image_roots` are resolved absolute paths: a root that is itself a link would admit nothing. Raises
    OutsideRootError where the id leaves all of them, by `..`, as an absolute path or through a link, or can be no path.
    """
    try:
        path = Path(os.path.realpath(images_dir / image_id))
    except ValueError as e:  # NUL, or a character that the file system's encoding lacks
        raise OutsideRootError(f"{image_id!r} cannot be the name of a file") from e
    if not any(path.is_relative_to(root) for root in (images_dir, *image_roots)):
        raise OutsideRootError(f"{image_id!r} is {path}")
    return path
