"""An image from its file: bounded, decoded, in RGB, resized to what the model sees; whatever goes wrong, as our errors.

Follows qwen-vl-utils (PIL, bicubic, its `smart_resize`) without importing it, since it would bring torch into the task
threads' process; the tests compare the two.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from storage.errors import ObjectStoreError
from storage.images.bounded import on_header, on_image_apart, on_image_quickly
from storage.images.decoders import DecoderGoneError, Result
from storage.images.decoding import ImageRefusedError
from storage.images.opening import NotRegularError
from workers.errors import PermanentError, TransientError
from workers.extract.colour import needs_care, to_rgb

Limits = tuple[int | None, int | None]  # the least and the most pixels


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A decoded image: pixels uint8 [H, W, 3] after resizing; sizes are (width, height)."""

    key: str
    pixels: npt.NDArray[np.uint8]
    sha256: str
    original_size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self.pixels.nbytes

    @property
    def resized_size(self) -> tuple[int, int]:
        """Width and height that the model sees."""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True, slots=True)
class PreparedImages:
    """The images of a question, in their order."""

    images: tuple[PreparedImage, ...]

    @property
    def nbytes(self) -> int:
        """Memory that they hold."""
        return sum(image.nbytes for image in self.images)


def load_image(
    path: str | Path, factor: int | None, limits: Limits, *, halp_compat: bool = False, exif_rotation: bool = False
) -> PreparedImage:
    """Read, check, decode and resize an image, from a file or an object's URL. Raises PermanentError, TransientError.

    `path` is a location as `resolve_image` returns it. `halp_compat` converts as the published scripts do: transparency is
    dropped, and 16 bits are clipped to white. `exif_rotation` turns the image upright first, which the recipe does not.
    """
    options = {"halp_compat": halp_compat, "exif_rotation": exif_rotation}
    return load_quick(path, factor, limits, **options) or load_apart(path, factor, limits, **options)


def load_quick(
    path: str | Path, factor: int | None, limits: Limits, *, halp_compat: bool, exif_rotation: bool
) -> PreparedImage | None:
    """Do what `load_image` does where that surely ends in seconds; return None where a process of its own is wanted."""
    with _refusing(path):
        arguments = (factor, limits, halp_compat, exif_rotation)
        result = on_image_quickly(str(path), _resized, *arguments, exif=exif_rotation)
    if result is None or result.array is None:
        return None
    # Pillow gives its pixels as bytes, which nobody may write to; torch wants arrays that one may.
    return _prepared(result, np.array(result.array), halp_compat, exif_rotation)


def load_apart(
    path: str | Path, factor: int | None, limits: Limits, *, halp_compat: bool, exif_rotation: bool
) -> PreparedImage:
    """Do what `load_image` does in a process that is killed where it takes too long."""
    with _refusing(path):
        result = on_image_apart(str(path), _resized, factor, limits, halp_compat, exif_rotation)
    assert result.array is not None
    return _prepared(result, result.array, halp_compat, exif_rotation)


def image_header(path: str | Path, *, exif_rotation: bool = False) -> tuple[tuple[int, int], bool]:
    """Return the width and height that an image's header says, and whether its EXIF data turn or mirror it when it is shown.

    Checked as `load_image` checks them. Of an object, what its header takes is fetched. Raises PermanentError, TransientError.
    """
    with _refusing(path):
        width, height, orientation = on_header(str(path), _size, exif_rotation).facts
    return (width, height), orientation in range(2, 9)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the height and width, multiples of `factor`, that the model sees. Source: qwen-vl-utils 0.0.14."""
    rounded_height = max(factor, round(height / factor) * factor)
    rounded_width = max(factor, round(width / factor) * factor)
    if rounded_height * rounded_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        # At least one factor: on a long thin image qwen-vl-utils returns 0 here, and Pillow then raises.
        return (
            max(factor, math.floor(height / scale / factor) * factor),
            max(factor, math.floor(width / scale / factor) * factor),
        )
    if rounded_height * rounded_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return rounded_height, rounded_width


def _prepared(result: Result, pixels: npt.NDArray[np.uint8], halp_compat: bool, exif_rotation: bool) -> PreparedImage:
    width, height = result.facts
    resized = f"{pixels.shape[1]}x{pixels.shape[0]}"
    key = f"{result.sha256}:{resized}{':bare' * halp_compat}{':upright' * exif_rotation}"
    return PreparedImage(key, pixels, result.sha256, (width, height))


@contextmanager
def _refusing(path: str | Path) -> Iterator[None]:
    """Raise what the file system, an object store or a decoder raises as our errors."""
    try:
        yield
    except ImageRefusedError as error:
        raise PermanentError(error.reason, f"{path} {error.what}") from error
    except DecoderGoneError as error:
        raise TransientError(f"{path}: the decoder {error}") from error
    except MemoryError as error:
        raise TransientError(f"{path}: not enough memory to decode it") from error
    except NotRegularError as error:
        message = f"{path} is {error.strerror}, not a file: replace it"
        raise PermanentError("image_unreadable", message) from error
    except FileNotFoundError as error:
        raise PermanentError("image_missing", f"{path} does not exist") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise PermanentError("image_missing", f"{path} cannot be read: {error.strerror}") from error
    except ObjectStoreError as error:  # access denied too: credentials expire in the middle of a run
        raise TransientError(str(error)) from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise PermanentError("image_too_large", f"{path} has {error.strerror}: shrink it") from error
        if error.errno == errno.ENAMETOOLONG:
            raise PermanentError("image_missing", f"{path} cannot be read: {error.strerror}") from error
        raise TransientError(f"{path}: {error.strerror}") from error


def _size(image: Image.Image, exif_rotation: bool) -> tuple[list[int], None]:
    """Return an open image's width, height and EXIF orientation."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if exif_rotation else _orientation(image)
    turned = exif_rotation and orientation >= 5
    return [*((image.height, image.width) if turned else (image.width, image.height)), orientation], None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that a header says; 1, the usual one, where its data are damaged.

    A run that does not turn images never reads them, so that they are no problem.
    """
    try:
        # The base class's: a PNG's own would decode the whole image to find data that stand after it.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  (Pillow raises whatever its parsers meet)
        return 1
    return found if isinstance(found, int) else 1


def _resized(
    image: Image.Image, factor: int | None, limits: Limits, halp_compat: bool, exif_rotation: bool
) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """Return an open image's width and height, upright if that is wanted, and its pixels as the model sees them."""
    upright = ImageOps.exif_transpose(image) if exif_rotation else image
    rgb = upright.convert("RGB") if halp_compat or not needs_care(upright) else to_rgb(upright)
    width, height = rgb.size
    least, most = limits
    if factor is None or least is None or most is None:  # the model's processor resizes
        return [width, height], np.asarray(rgb)
    resized_height, resized_width = smart_resize(height, width, factor, least, most)
    return [width, height], np.asarray(rgb.resize((resized_width, resized_height)))
