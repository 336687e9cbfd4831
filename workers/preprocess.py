"""From an image file and a question to an engine request: bounded, decoded once per image in flight, resized, tokenised.

Follows qwen-vl-utils (PIL, bicubic, its `smart_resize`) without importing it, since it would bring torch into the task
threads' process; the tests compare the two.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from storage.errors import ObjectStoreError
from storage.images import OutsideRootError, resolve_image
from storage.location import is_url
from storage.settings import SpecialTokens
from storage.store import read_bounded
from workers.engine import ModelCard, Recipe, Request
from workers.errors import PermanentError, TransientError
from workers.image_cache import ImageCache
from workers.prompt import PromptParts, QuestionTokenizer

MAX_ASPECT_RATIO = 200
MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 1 << 30  # that many pixels, uncompressed, with 16 bits and transparency, have 800 MB
_TRANSPARENT_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}
# Of decoded images in memory: 1,100 of 400 tokens, or 27 of 16k, may be in use; 64 MB wait for further questions.
_IMAGE_BYTES = 1 << 30
_IDLE_IMAGE_BYTES = 64 << 20
# Not EPS: Pillow runs Ghostscript on it, whatever the file is called.
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "ICO", "JPEG2000", "TGA", "AVIF")
Image.init()
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # a build of Pillow may lack some
_CONTEXT = 32_768  # what the model was trained on; its config admits more, and transformers does not check

# `load_image` checks the size before decoding. Pillow's own bound, which raises above twice this value, is for the images
# within images that only the decoder sees: an icon's PNG, a TIFF's tiles.
Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS // 2


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


class Preprocessor:
    """Prepares questions for one loaded model. Thread-safe."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._tokenize = QuestionTokenizer(card.tokenizer_json)
        self._prompt = card.prompt()
        self._factor = card.patch_size * card.merge_size
        self._images: ImageCache[PreparedImage] = ImageCache(_IMAGE_BYTES, _IDLE_IMAGE_BYTES)

    @contextmanager
    def hold(
        self,
        image_id: str,
        images_dir: str | Path,
        roots: tuple[str | Path, ...],
        limits: tuple[int, int],
        *,
        halp_compat: bool = False,
        exif_rotation: bool = False,
    ) -> Iterator[PreparedImage]:
        """Yield an image within pixel limits (minimum, maximum), which takes its memory until the block ends.

        Raises PermanentError, TransientError.
        """
        try:
            location = resolve_image(image_id, images_dir, roots)
        except OutsideRootError as error:
            raise PermanentError("image_outside_root", str(error)) from error

        def load() -> PreparedImage:
            return load_image(location, self._factor, limits, halp_compat=halp_compat, exif_rotation=exif_rotation)

        with self._images.hold((location, *limits, halp_compat, exif_rotation), load) as image:
            yield image

    def image(self, *arguments: Any, **options: Any) -> PreparedImage:
        """Return what `hold` yields, to a caller that bounds its memory itself."""
        with self.hold(*arguments, **options) as image:
            return image

    def request(
        self,
        image: PreparedImage,
        question: str,
        recipe: Recipe,
        prompt: PromptParts | None = None,
        special_tokens: SpecialTokens = "text",
    ) -> Request:
        """Return the engine request of a question about an image. Raises PermanentError: the prompt is too long.

        `prompt` None is that of the checkpoint's own template; another one's head is the recipe's too.
        """
        prompt = prompt or self._prompt
        asked = self._tokenize(prompt.around(question), special_tokens)
        suffix = (*prompt.after_image_ids, *asked, *prompt.tail_ids)
        tokens = image.pixels.shape[0] * image.pixels.shape[1] // self._factor**2
        total = len(prompt.head_ids) + tokens + len(suffix)
        limit = min(_CONTEXT, self._card.max_position_embeddings)
        if total > limit:
            raise PermanentError(
                "prompt_too_long",
                f"the prompt has {total} tokens, {tokens} of them from the image; the model takes {limit}. "
                "Shorten the question or lower --max-pixels",
            )
        return Request(image.key, image.pixels, suffix, total, recipe)


def load_image(
    path: str | Path, factor: int, limits: tuple[int, int], *, halp_compat: bool = False, exif_rotation: bool = False
) -> PreparedImage:
    """Read, check, decode and resize an image, from a file or an object's URL. Raises PermanentError, TransientError.

    `halp_compat` converts as the published scripts do: transparency is dropped, and 16 bits are clipped to white.
    `exif_rotation` turns the image upright first, which the recipe does not.
    """
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    with _decoding(path), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(path, *image.size)
        upright = ImageOps.exif_transpose(image) if exif_rotation else image
        rgb = upright.convert("RGB") if halp_compat else _to_rgb(upright)
        width, height = rgb.size
        resized_height, resized_width = smart_resize(height, width, factor, *limits)
        pixels = np.array(rgb.resize((resized_width, resized_height)))
    key = f"{digest}:{resized_width}x{resized_height}{':bare' * halp_compat}{':upright' * exif_rotation}"
    return PreparedImage(key, pixels, digest, (width, height))


def image_size(path: str | Path, *, exif_rotation: bool = False) -> tuple[int, int]:
    """Return the width and height that an image's header says, checked as `load_image` checks them; decodes no pixels.

    Of an object, what its header takes is fetched. Raises PermanentError, TransientError.
    """
    return image_header(path, exif_rotation=exif_rotation)[0]


def image_header(path: str | Path, *, exif_rotation: bool = False) -> tuple[tuple[int, int], bool]:
    """Return what `image_size` does, and whether the EXIF data say that the image is to be shown turned or mirrored."""
    with _opened(path) as file, _decoding(path), Image.open(file, formats=_FORMATS) as image:
        _check_size(path, *image.size)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if exif_rotation else _orientation(image)
        size = (image.height, image.width) if exif_rotation and orientation >= 5 else (image.width, image.height)
        return size, orientation in range(2, 9)


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


def _read(path: str | Path) -> bytes:
    with _reading(path):
        data = read_bounded(str(path), MAX_IMAGE_BYTES)
    if data is None:
        raise _too_many_bytes(path)
    if not data:
        raise _empty(path)
    return data


def _opened(path: str | Path) -> BinaryIO:
    """Return an image's file, or an object as one."""
    with _reading(path):
        if is_url(path):
            from storage.object_file import open_image

            file, size = open_image(str(path))
            if 0 < size <= MAX_IMAGE_BYTES:
                return file
        else:
            size = os.stat(path).st_size
            if 0 < size <= MAX_IMAGE_BYTES:
                return Path(path).open("rb")
    raise _too_many_bytes(path) if size else _empty(path)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Raise what the file system or an object store raises as our errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise PermanentError("image_missing", f"{path} does not exist") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise PermanentError("image_missing", f"{path} cannot be read: {error.strerror}") from error
    except ObjectStoreError as error:  # access denied too: credentials expire in the middle of a run
        raise TransientError(str(error)) from error
    except OSError as error:
        raise TransientError(f"{path}: {error.strerror}") from error


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Raise what decoders raise as our errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PermanentError:
        raise
    except ObjectStoreError as error:  # `image_size` fetches while it reads
        raise TransientError(str(error)) from error
    except Image.DecompressionBombError as error:
        raise PermanentError("image_too_large", f"{path}: {error}: shrink it") from error
    except UnidentifiedImageError as error:
        raise PermanentError("image_unreadable", f"{path} is not an image that Pillow can read: replace it") from error
    except MemoryError as error:
        raise TransientError(f"{path}: not enough memory to decode it") from error
    except Exception as error:
        # On damaged data decoders raise OSError, SyntaxError, struct.error, ZeroDivisionError and more. What `load_image`
        # decodes is in memory, so no I/O error is among them.
        raise PermanentError("image_corrupt", f"{path} cannot be decoded ({error}): replace it") from error


def _empty(path: str | Path) -> PermanentError:
    return PermanentError("image_empty", f"{path} has no bytes: replace it")


def _too_many_bytes(path: str | Path) -> PermanentError:
    return PermanentError("image_too_large", f"{path} has more than {MAX_IMAGE_BYTES:,} bytes: shrink it")


def _check_size(path: str | Path, width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise PermanentError(
            "image_too_large", f"{path} has {width}x{height} pixels, more than {MAX_IMAGE_PIXELS:,}: shrink it"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise PermanentError(
            "image_aspect_ratio",
            f"{path} is {width}x{height}: the longer side is over {MAX_ASPECT_RATIO} times the shorter",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the first frame in RGB: transparency on white, 16 bits scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bits(image).convert("RGB")
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Map grey levels of more than 8 bits to 8; Pillow's own conversion clips them to white.

    A file of 32-bit integers or floats does not say what white is: it is the least usual one that its values fit under.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((level for level in usual if values.max() <= level), usual[-1])
    return Image.fromarray(np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8))
