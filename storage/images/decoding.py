"""A stranger's image, opened within bounds: of formats, of pixels, and of time.

Work on an image whose time cannot grow beyond its pixels is done here, in the caller's thread. All other work is done in a
process that can be killed: see `storage/images/decoders.py`.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from storage.images.filetype import what_it_is

MAX_ASPECT_RATIO = 200
MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 1 << 30  # that many pixels, uncompressed, with 16 bits and transparency, have 800 MB
HEADER = 1 << 16  # bytes that hold the header of nearly every image
# Not EPS: Pillow runs Ghostscript on it, whatever the file is called.
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "ICO", "JPEG2000", "TGA", "AVIF")
Image.init()
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # a build of Pillow may lack some

# The size is checked before decoding. Pillow's own bound, which raises above twice this value, is for the images within
# images that only the decoder sees: an icon's PNG, a TIFF's tiles.
Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS // 2

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# Of what is decoded in the caller's thread. A JPEG's EXIF block is parsed when it is opened, and each entry may copy all of
# it: 32 KB make 90 MB, a megabyte would make 100 GB.
_LONGEST_HEADER = 32 << 10  # bytes before a JPEG's scan
_SCANS = 64  # libjpeg writes ten; each takes up to 70 ns a pixel, however few its bytes
_CHUNKS = 20_000  # of a PNG, 10 us each; libpng's have 8 KB

# No encoder writes so many; the whole image is gone over in each.
_MOST_SCANS = 500

Facts = list[int]
# What is done with an open image: it returns small facts, and an array where there is one. A function of a module.
Work = Callable[..., tuple[Facts, npt.NDArray[np.uint8] | None]]


class ImageRefusedError(Exception):
    """An image that will never do. `reason` is the class of its failure; `what` follows the file's name in a sentence."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(reason, what)
        self.reason = reason
        self.what = what


def work_on(file: BinaryIO, work: Work, *arguments: Any) -> tuple[Facts, npt.NDArray[np.uint8] | None]:
    """Open an image, check its size and do the work, here and now. Raises ImageRefusedError, MemoryError.

    What reading the file raises comes out as a decoder's error, so bytes in memory are meant, or a file that keeps its own.
    """
    with _refusing(file), Image.open(file, formats=_FORMATS) as image:
        check_size(*image.size)
        return work(image, *arguments)


def filled(data: bytes) -> bytes:
    """Return an image's bytes. Raises ImageRefusedError where there are none."""
    if not data:
        raise ImageRefusedError("image_empty", "has no bytes: replace it")
    return data


def check_size(width: int, height: int) -> None:
    """Raise ImageRefusedError where an image has too many pixels or too long a side."""
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageRefusedError("image_too_large", f"has {width}x{height} pixels, more than {MAX_IMAGE_PIXELS:,}: shrink it")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageRefusedError(
            "image_aspect_ratio",
            f"is {width}x{height}: the longer side is over {MAX_ASPECT_RATIO} times the shorter",
        )


@contextmanager
def _refusing(file: BinaryIO) -> Iterator[None]:
    """Raise what decoders raise as our error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ImageRefusedError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageRefusedError("image_too_large", f"is too large: {error}: shrink it") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        known = what_it_is(file.read(1024))
        what = f"it is {known}" if known else "replace it"
        raise ImageRefusedError("image_unreadable", f"is not an image that Pillow can read: {what}") from error
    except Exception as error:
        # On damaged data decoders raise OSError, SyntaxError, struct.error, ZeroDivisionError and more.
        raise ImageRefusedError("image_corrupt", f"cannot be decoded ({error}): replace it") from error


# What takes no longer than its pixels do


def may_be_quick(start: bytes) -> bool:
    """Tell whether a file that begins so is of a format of which `is_quick` knows."""
    return start.startswith((_JPEG, _PNG)) or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")


def is_quick(data: bytes, *, exif: bool = False) -> bool:
    """Tell whether an image's bytes promise that decoding ends in seconds. `exif`: its EXIF data will be parsed too.

    Raises ImageRefusedError where they promise the contrary.
    """
    if data.startswith(_JPEG):
        return _quick_jpeg(data)
    if exif or not may_be_quick(data):  # EXIF data of any length, in these
        return False
    return _quick_png(data) if data.startswith(_PNG) else _quick_webp(data)


def is_quick_to_open(data: bytes) -> bool:
    """Tell the same of the header alone, of which `data` holds the file's first bytes: those of JPEG and PNG, mostly."""
    if data.startswith(_JPEG):
        return _jpeg_header(data) is not None
    return data.startswith(_PNG) and b"IDAT" in data


def _jpeg_header(data: bytes) -> tuple[int, bool] | None:
    """Return where a JPEG's first scan begins, and whether it is the only one that a decoder looks at.

    None where the segments before it are more than we look through, or are not one after the other as they should be.
    """
    at, frame, components = 2, 0, 0
    while at + 5 < min(len(data), _LONGEST_HEADER) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if kind == 0xDA:
            # Baseline and extended sequential frames whose first scan has every component are decoded in one pass.
            return at, frame in {0xC0, 0xC1} and data[at + 4] == components
        if kind in {0xC0, 0xC1, 0xC2} and at + 9 < len(data):
            frame, components = kind, data[at + 9]
        elif kind not in {0xC4, 0xDB, 0xDD, 0xFE} and not 0xE0 <= kind <= 0xEF:
            return None
        if length < 2:
            return None
        at += 2 + length
    return None


def _quick_jpeg(data: bytes) -> bool:
    header = _jpeg_header(data)
    if header is None:
        return False
    scan, single = header
    if single:
        return True
    # In entropy-coded data FF is followed by 00: what looks like a scan before the image's end is one, but for a few in
    # Huffman tables.
    end = data.find(b"\xff\xd9", scan)
    scans = data.count(b"\xff\xda", scan, end if end >= 0 else len(data))
    if scans > _MOST_SCANS:
        raise ImageRefusedError("image_too_slow", f"is a JPEG of {scans:,} scans, which take minutes: save it again")
    return data.count(b"\xff\xda", scan) <= _SCANS


def _quick_png(data: bytes) -> bool:
    at, chunks = 8, 0
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks += 1
        if kind == b"IEND":
            return True
        if chunks > _CHUNKS:
            return False
        at += 12 + length
    return True  # it is cut short, and no slower for it


def _quick_webp(data: bytes) -> bool:
    """Tell whether it is a still image: a frame, or an extended header that promises no animation."""
    return data[12:16] in {b"VP8 ", b"VP8L"} or (data[12:16] == b"VP8X" and data[20:21] != b"" and not data[20] & 0x02)
