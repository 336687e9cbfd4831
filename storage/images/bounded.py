"""The one way in which an image of a stranger is opened: a regular file, so many bytes and pixels, and so much time.

Bytes, their digest and the pixels come from one open handle. What these functions raise: ImageRefusedError where the image
will never do; DecoderGoneError, MemoryError and OSError (see `open_regular`) where the same may work later.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from hashlib import sha256
from typing import Any

from storage.images.decoder import SECONDS, Job
from storage.images.decoders import Result, decoders
from storage.images.decoding import (
    HEADER,
    MAX_IMAGE_BYTES,
    ImageRefusedError,
    Work,
    filled,
    is_quick,
    is_quick_to_open,
    may_be_quick,
    work_on,
)
from storage.images.lookup import image_handle, opened_image, read_image
from storage.images.opening import read_bounded, too_large
from storage.stores.location import is_url


def on_image(location: str, work: Work, *arguments: Any, seconds: float = SECONDS) -> Result:
    """Do some work on the image at a resolved location, wherever that is within bounds."""
    return on_image_quickly(location, work, *arguments) or on_image_apart(location, work, *arguments, seconds=seconds)


def on_image_quickly(location: str, work: Work, *arguments: Any, exif: bool = False) -> Result | None:
    """Do the work in this thread, where it surely ends in seconds; else return None. `exif`: it parses EXIF data."""
    data = _candidate(location)
    if data is None or not is_quick(data, exif=exif):
        return None
    facts, array = work_on(io.BytesIO(data), work, *arguments)
    return Result(facts, array, sha256(data).hexdigest())


def on_image_apart(location: str, work: Work, *arguments: Any, seconds: float = SECONDS) -> Result:
    """Do the work in a process that the kernel kills after so many seconds of CPU, and some for the image's pixels."""
    with image_handle(location, MAX_IMAGE_BYTES) as (handle, content):
        return decoders.run(handle, Job(work, arguments, seconds=seconds), (*content, work, *arguments))


def on_header(location: str, work: Work, *arguments: Any) -> Result:
    """Do some work on an image that was not decoded. Of an object, what that takes is fetched."""
    with opened_image(location) as (file, size):
        if size > MAX_IMAGE_BYTES:
            raise too_large(MAX_IMAGE_BYTES)
        start = filled(file.read(HEADER))
        if is_quick_to_open(start):
            with suppress(ImageRefusedError, MemoryError):  # of a part of the file: the whole may do
                return Result(*work_on(io.BytesIO(start), work, *arguments), "")

        def read(at: int, length: int) -> bytes:
            file.seek(at)
            return file.read(length)

        by_ranges = size if is_url(location) else None
        job = Job(work, arguments, whole=False, by_ranges=by_ranges)
        return decoders.run(read if by_ranges else file.fileno(), job)


def _candidate(location: str) -> bytes | None:
    """Return an image's bytes; None, unread, where the first ones are not of a format that may be quick."""
    if is_url(location):
        return filled(read_image(location, MAX_IMAGE_BYTES))
    with image_handle(location, MAX_IMAGE_BYTES) as (handle, _):
        if not may_be_quick(filled(os.pread(handle, 16, 0))):
            return None
        return read_bounded(handle, MAX_IMAGE_BYTES)
