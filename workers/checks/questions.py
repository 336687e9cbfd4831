"""The self-check's questions: of a user's own table, or about a dozen images that are drawn here, always the same."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from storage.errors import UserError
from storage.images.bounded import on_image
from storage.images.decoders import DecoderGoneError
from storage.images.decoding import ImageRefusedError
from storage.images.lookup import OutsideRootError, resolve_image
from workers.extract.colour import needs_care, to_rgb

_QUESTIONS = (
    "What is in the image?",
    "How many shapes are there, and which colours do they have? Answer in one sentence.",
    "Is there any text in this picture? If so, read it out; if not, say so.",
    "Why?",
    "Which colour covers most of the picture? Answer in one word.",
    "画像には何がありますか？",
    "Is the upper left corner darker than the lower right one, and by how much would you say it is?",
)
# Width and height: from less than one merged patch to a thousand of them, and 1:8 to 10:1.
_SIZES = (
    (224, 224), (640, 480), (333, 517), (20, 20), (800, 80), (60, 480),
    (448, 252), (250, 251), (1024, 768), (150, 300), (500, 375), (97, 61),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """An image and a question about it."""

    path: Path
    question: str


def bundled(directory: Path, number: int) -> list[Case]:
    """Draw the images into a directory; return the first questions about them, two or three an image."""
    endless = itertools.cycle(_QUESTIONS)
    cases = []
    for index, size in enumerate(_SIZES):
        path = directory / f"{index:02d}.png"
        _draw(index, *size).save(path)
        cases += [Case(path, next(endless)) for _ in range(3 - index % 2)]
    return cases[:number]


def given(table: Path, images_dir: Path, number: int) -> list[Case]:
    """Return the first questions of a table. Raises UserError."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(itertools.islice(csv.DictReader(file), number))
        root = images_dir.resolve(strict=True)
        cases = [Case(Path(resolve_image(r.get("image_id") or r["image_name"], root, ())), r["question"]) for r in rows]
    except (OSError, UnicodeDecodeError, csv.Error, OutsideRootError) as error:
        raise UserError(f"{table} with --images-dir {images_dir} cannot be read: {error}") from error
    except KeyError as error:
        raise UserError(f"{table} has no column {error}: it needs image_id (or image_name) and question") from error
    if not cases:
        raise UserError(f"{table} has no questions")
    return cases


def alike(cases: Sequence[Case], folder: Path) -> list[Case]:
    """Return the cases with pictures that both ways convert to RGB alike: those with transparency or 16 bits as a run has them.

    How a run converts them is a documented choice, and not what the engine is checked for.
    """
    made: dict[Path, Path] = {}
    for path in dict.fromkeys(case.path for case in cases):
        with suppress(OSError, ImageRefusedError, DecoderGoneError, MemoryError):  # the engine's own way names the reason
            if (pixels := on_image(str(path), _with_care).array) is not None:
                made[path] = folder / f"{len(made):03d}.png"
                Image.fromarray(pixels).save(made[path])
    return [replace(case, path=made.get(case.path, case.path)) for case in cases]


def _with_care(image: Image.Image) -> tuple[list[int], npt.NDArray[np.uint8] | None]:
    """Return a picture's pixels as a run has them; none where Pillow's own conversion loses nothing."""
    return [], np.asarray(to_rgb(image)) if needs_care(image) else None


def _draw(index: int, width: int, height: int) -> Image.Image:
    """Draw a gradient with shapes on it; on every third image text, on every fourth a pattern of a pixel's detail."""
    y, x = np.mgrid[0:height, 0:width]
    ramps = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)]
    pixels = np.stack([ramps[(index + channel) % 3] for channel in range(3)], axis=-1)
    if index % 4 == 3:
        pixels = (pixels + 90 * ((x // (1 + index % 3) + y) % 2)[..., None]) % 256
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in range(index % 5 + 1):
        left, top = width * (shape * 37 % 80) // 100, height * (shape * 53 % 70) // 100
        box = (left, top, left + width // 5, top + height // 4)
        fill = ("red", "navy", "gold", "green", "white")[(index + shape) % 5]
        (draw.ellipse if shape % 2 else draw.rectangle)(box, fill=fill)
    if index % 3 == 1:
        text = f"No. {index}: EXIT 42"
        draw.text((width // 10, height // 3), text, fill="black", font=ImageFont.load_default(max(10, height // 6)))
    return image
