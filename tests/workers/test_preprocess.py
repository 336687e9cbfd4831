from __future__ import annotations

import errno
import io
import math
import os
import random
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import qwen_vl_utils
import skimage
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, UnidentifiedImageError, features
from qwen_vl_utils.vision_process import smart_resize as their_smart_resize

from storage.images.decoding import MAX_ASPECT_RATIO, MAX_IMAGE_PIXELS
from workers.engine.fake import FakeEngine
from workers.engine.interface import EngineSpec, ModelInfo, Recipe
from workers.errors import PermanentError, TransientError
from workers.extract import preprocess
from workers.extract.loading import PreparedImage, load_image, load_quick, smart_resize
from workers.extract.preprocess import Preprocessor

FACTOR = 28
LIMITS = (3136, 12845056)  # the checkpoint's own
BUNDLED = Path(skimage.__file__).parent / "data"


def is_plain(path: Path) -> bool:
    """Tell whether Pillow reads an image, and in a mode of which the recipe makes sense (see "Accepted, and as what")."""
    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "P", "RGB", "RGBA", "CMYK") and (
                image.mode == "RGBA" or "transparency" not in image.info
            )
    except UnidentifiedImageError:
        return False


PHOTOGRAPHS = sorted(filter(is_plain, (p for p in BUNDLED.iterdir() if p.suffix in (".png", ".jpg", ".tif", ".gif"))))


def load(path: Path, limits: tuple[int, int] = LIMITS) -> PreparedImage:
    return load_image(path, FACTOR, limits)


def refused(path: Path, reason: str) -> str:
    """Assert that an image is refused for a reason, by a message that names the file; return the message."""
    with pytest.raises(PermanentError) as caught:
        load(path)
    assert caught.value.reason == reason
    assert str(path) in caught.value.message
    return caught.value.message


def photograph(mode: str = "RGB", size: tuple[int, int] = (96, 64)) -> Image.Image:
    image = Image.open(BUNDLED / "chelsea.png").convert("RGB").resize(size)
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def resized(image: Image.Image) -> np.ndarray:
    """Resize an RGB image as the recipe does."""
    height, width = their_smart_resize(image.height, image.width, FACTOR, *LIMITS)
    return np.asarray(image.resize((width, height)))


def unscaled(path: Path) -> np.ndarray:
    """Load an image whose sides are multiples of the factor and whose size is within the limits: nothing is interpolated."""
    prepared = load(path)
    assert prepared.resized_size == prepared.original_size
    return prepared.pixels


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header claims a size, with the given chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [(b"IHDR", header), *chunks, (b"IEND", b"")]
    )


# The recipe


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        (256 * 784, 1280 * 784),
        (4 * 784, 16 * 784),
        (784, 784),  # one merged patch
        (3136, 3136),
        (1_500_000, 3_000_000),  # enlarges most of them
        (784, 10**9),
    ],
)
@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_pixels_are_bit_equal_to_the_recipe(path, limits):
    ours = load(path, limits)
    ask = {"image": str(path), "min_pixels": limits[0], "max_pixels": limits[1]}
    with Image.open(path) as image:
        assert ours.original_size == image.size
        height, width = their_smart_resize(image.height, image.width, FACTOR, *limits)
    if 0 in (height, width):
        with pytest.raises(ValueError, match="must be > 0"):
            qwen_vl_utils.fetch_image(ask)
        assert ours.resized_size == (max(FACTOR, width), max(FACTOR, height))
        return
    theirs = qwen_vl_utils.fetch_image(ask)
    assert ours.pixels.dtype == np.uint8
    assert ours.resized_size == theirs.size
    np.testing.assert_array_equal(ours.pixels, np.asarray(theirs))
    assert ours.sha256 == sha256(path.read_bytes()).hexdigest()


def test_there_are_photographs_to_compare():
    assert len(PHOTOGRAPHS) >= 15


SIDES = st.integers(1, 20_000) | st.integers(1, 300)


@settings(max_examples=500, deadline=None)
@given(height=SIDES, width=SIDES, low=st.integers(1, 4000), high=st.integers(1, 20_000), factor=st.sampled_from([28, 32]))
def test_smart_resize_is_the_recipes(height, width, low, high, factor):
    assume(max(height, width) <= MAX_ASPECT_RATIO * min(height, width))
    limits = (min(low, high) * factor**2, high * factor**2)
    theirs = their_smart_resize(height, width, factor, *limits)
    ours = smart_resize(height, width, factor, *limits)
    # A long thin image under a low limit: they round its shorter side down to 0, and Pillow then refuses to resize.
    assert ours == tuple(max(factor, side) for side in theirs)
    assert ours[0] % factor == ours[1] % factor == 0


def test_thin_image_keeps_one_factor(tmp_path):
    photograph(size=(1900, 10)).save(tmp_path / "thin.png")
    assert 0 in their_smart_resize(10, 1900, FACTOR, 3136, 28 * 28 * 16)
    assert load(tmp_path / "thin.png", (3136, 28 * 28 * 16)).resized_size == (1540, 28)


def test_key_names_content_and_size(tmp_path):
    """Equal bytes under two names are one image to the engine; another size is another."""
    photograph().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    photograph(size=(64, 96)).save(tmp_path / "c.png")
    a, b, c = (load(tmp_path / f"{name}.png") for name in "abc")
    assert a.key == b.key
    assert len({a.key, c.key, load(tmp_path / "a.png", (784, 784)).key}) == 3


# Accepted, and as what


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "1.png")
    prepared = load(tmp_path / "1.png")
    assert prepared.original_size == (1, 1)
    assert prepared.resized_size == (56, 56)
    assert (prepared.pixels == (10, 200, 30)).all()


@pytest.mark.parametrize("mode", ["CMYK", "L", "YCbCr"])
def test_jpeg_of_other_colours(tmp_path, mode):
    photograph(mode).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == ("RGB" if mode == "YCbCr" else mode)
        expected = resized(image.convert("RGB"))
    np.testing.assert_array_equal(load(tmp_path / "a.jpg").pixels, expected)


def test_one_bit(tmp_path):
    image = photograph("1", (112, 84))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(unscaled(tmp_path / "a.png"), np.asarray(image.convert("RGB")))
    assert set(np.unique(unscaled(tmp_path / "a.png"))) == {0, 255}


def test_palette_without_transparency(tmp_path):
    image = photograph("P", (112, 84))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(unscaled(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, kind):
    if kind == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    frames = [Image.new("RGB", (84, 84), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=50, **options)
    assert (unscaled(tmp_path / f"a.{kind}") == (255, 0, 0)).all()


ALPHA = np.tile(np.linspace(0, 255, 84).astype(np.uint8), (84, 1))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite by the definition, in float; Pillow's own rounding may differ by one."""
    weight = alpha[..., None] / 255
    return colour * weight + 255 * (1 - weight)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_on_white(tmp_path, mode):
    image = photograph("RGB" if mode == "RGBA" else "L", (84, 84))
    expected = on_white(np.asarray(image.convert("RGB")), ALPHA)
    image.putalpha(Image.fromarray(ALPHA))
    assert image.mode == mode
    image.save(tmp_path / "a.png")
    pixels = unscaled(tmp_path / "a.png")
    assert np.abs(pixels - expected).max() <= 1
    assert (pixels[:, 0] == 255).all()  # whatever colour lies under full transparency
    if mode == "RGBA":
        theirs = qwen_vl_utils.fetch_image({"image": str(tmp_path / "a.png"), "min_pixels": LIMITS[0]})
        np.testing.assert_array_equal(pixels, np.asarray(theirs))


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_transparent_palette_entry_is_white(tmp_path, kind):
    image = Image.new("P", (84, 84), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 42, 84))
    image.save(tmp_path / f"a.{kind}", transparency=0)
    pixels = unscaled(tmp_path / f"a.{kind}")
    assert (pixels[:, :42] == 255).all()
    assert (pixels[:, 42:] == (0, 0, 255)).all()


def test_partly_transparent_palette(tmp_path):
    image = Image.new("P", (84, 84), 1)
    image.putpalette([0, 0, 0, 0, 0, 200])
    image.save(tmp_path / "a.png", transparency=bytes([255, 51]))
    assert np.abs(unscaled(tmp_path / "a.png") - np.array([204, 204, 244.0])).max() <= 1


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (1, 2, 3)), ("L", 77)])
def test_transparent_colour_is_white(tmp_path, mode, colour):
    image = Image.new(mode, (84, 84), "black")
    image.paste(colour, (0, 0, 42, 84))
    image.save(tmp_path / "a.png", transparency=colour)
    pixels = unscaled(tmp_path / "a.png")
    assert (pixels[:, :42] == 255).all()
    assert (pixels[:, 42:] == 0).all()


def levels(top: int) -> np.ndarray:
    """Grey levels from 0 to `top`, of every remainder."""
    return np.linspace(0, top, 84 * 84).astype(np.uint16).reshape(84, 84)


def scaled(values: np.ndarray) -> np.ndarray:
    """65535 is white; each level to the nearest of 256, in integers."""
    return np.repeat(((values.astype(np.int64) + 128) // 257)[..., None], 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize("top", [65535, 4095, 255, 0])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_scale_to_eight(tmp_path, top, kind):
    """A dark picture stays dark: 16 bits say what white is, so the brightest level that occurs does not matter."""
    values = levels(top)
    Image.fromarray(values).save(tmp_path / f"a.{kind}")
    with Image.open(tmp_path / f"a.{kind}") as image:
        assert image.mode == "I;16"
    np.testing.assert_array_equal(unscaled(tmp_path / f"a.{kind}"), scaled(values))


def test_sixteen_bits_big_endian(tmp_path):
    values = levels(65535)
    header = struct.pack(
        ">2sHIH" + "HHII" * 8, b"MM", 42, 8, 8,
        256, 4, 1, 84, 257, 4, 1, 84, 258, 4, 1, 16, 259, 4, 1, 1, 262, 4, 1, 1, 273, 4, 1, 200, 278, 4, 1, 84,
        279, 4, 1, 84 * 84 * 2,
    )  # fmt: skip
    (tmp_path / "a.tif").write_bytes(header.ljust(200, b"\0") + values.astype(">u2").tobytes())
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "I;16B"
    np.testing.assert_array_equal(unscaled(tmp_path / "a.tif"), scaled(values))


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (levels(65535).astype(np.int32), 65535),
        (levels(255).astype(np.int32), 255),
        (levels(65535).astype(np.float32), 65535),
        (levels(255).astype(np.float32), 255),
        (levels(65535).astype(np.float32) / 65535, 1),
    ],
    ids=["int-16", "int-8", "float-16", "float-8", "float-1"],
)
def test_thirty_two_bits_scale_by_the_usual_white(tmp_path, values, white):
    """A 32-bit TIFF does not say what white is: the least of 1 (floats), 255 and 65535 that no value exceeds."""
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.rint(values.astype(np.float64) * 255 / white)
    pixels = unscaled(tmp_path / "a.tif")
    assert np.abs(pixels - expected[..., None]).max() <= (0 if values.dtype == np.int32 else 1)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_values_beyond_any_white_and_not_numbers_are_clipped(tmp_path):
    values = np.full((84, 84), 32768, np.float32)
    values[0, :5] = (np.nan, np.inf, -np.inf, -5, 1e9)
    Image.fromarray(values).save(tmp_path / "a.tif")
    pixels = unscaled(tmp_path / "a.tif")
    assert pixels[0, :5, 0].tolist() == [0, 255, 0, 0, 255]
    assert (pixels[1:] == 128).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_in_exif_is_ignored_as_in_the_recipe(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph().save(tmp_path / "a.jpg", exif=exif)
    theirs = qwen_vl_utils.fetch_image({"image": str(tmp_path / "a.jpg"), "min_pixels": LIMITS[0]})
    prepared = load(tmp_path / "a.jpg")
    assert prepared.original_size == (96, 64)
    np.testing.assert_array_equal(prepared.pixels, np.asarray(theirs))


# What a viewer does with the eight orientations (EXIF 2.3, tag 0x0112), as operations on [H, W, 3].
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize(("orientation", "turn"), UPRIGHT.items())
def test_rotation_in_exif_is_applied_where_it_is_asked_for(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph().save(tmp_path / "a.png", exif=exif)
    Image.fromarray(turn(np.asarray(photograph()))).save(tmp_path / "upright.png")
    prepared = load_image(tmp_path / "a.png", FACTOR, LIMITS, exif_rotation=True)
    expected = load(tmp_path / "upright.png")
    np.testing.assert_array_equal(prepared.pixels, expected.pixels)
    assert prepared.original_size == expected.original_size
    assert prepared.key != load(tmp_path / "a.png").key  # the two share nothing in the engine


# Refused


def test_missing(tmp_path):
    assert "does not exist" in refused(tmp_path / "absent.jpg", "image_missing")


def test_directory(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    refused(tmp_path / "a.jpg", "image_missing")


def test_below_a_file(tmp_path):
    (tmp_path / "a").touch()
    refused(tmp_path / "a" / "b.jpg", "image_missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_forbidden(tmp_path):
    photograph().save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    assert "Permission denied" in refused(tmp_path / "a.png", "image_missing")


def test_forbidden_by_the_file_system(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()
    monkeypatch.setattr("storage.images.lookup.open_regular", raising(errno.EACCES))
    assert "Permission denied" in refused(tmp_path / "a.png", "image_missing")


def test_empty(tmp_path):
    (tmp_path / "a.jpg").touch()
    refused(tmp_path / "a.jpg", "image_empty")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html><body>404</body></html>", b"not an image\n", b"\0", b"\xff\xd8"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_not_an_image(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "image_unreadable")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "tiff"])
def test_truncated(tmp_path, kind, share):
    data = encoded(photograph(), kind)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PermanentError) as caught:
        load(path)
    # TIFF keeps its directory at the end: without it Pillow does not know what it has.
    assert caught.value.reason in {"image_corrupt", *(["image_unreadable"] if kind == "tiff" else [])}
    assert str(path) in caught.value.message


def test_flipped_bit(tmp_path):
    data = bytearray(encoded(photograph(), "png"))
    data[len(data) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    refused(tmp_path / "a.png", "image_corrupt")


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (5601, 28)])
def test_aspect_ratio(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert f"{size[0]}x{size[1]}" in refused(tmp_path / "a.png", "image_aspect_ratio")


def test_greatest_aspect_ratio_is_accepted(tmp_path):
    Image.new("RGB", (2000, 10), "red").save(tmp_path / "a.png")
    assert load(tmp_path / "a.png").resized_size == (1988, 28)


def bombs() -> dict[str, bytes]:
    """Files of a few hundred bytes that claim more than a hundred megapixels."""
    zeros = zlib.compress(bytes(3_000_000), 9)
    side = math.isqrt(MAX_IMAGE_PIXELS) + 1
    inner = png(side, side, (b"IDAT", zeros))
    gif = bytearray(encoded(Image.new("P", (10, 10)), "gif"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(encoded(Image.new("RGB", (10, 10)), "bmp"))
    bmp[18:26] = struct.pack("<ii", side, side)
    jpeg = bytearray(encoded(Image.new("RGB", (10, 10)), "jpeg"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return {
        "png": inner,
        "png-huge": png(2**31 - 1, 2**31 - 1, (b"IDAT", zeros)),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "jpeg": bytes(jpeg),
        # An icon says 256x256, the PNG in it what it likes: only the decoder sees that.
        "ico": struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner,
    }


@pytest.mark.parametrize(("name", "data"), bombs().items(), ids=bombs().keys())
def test_too_large_is_refused_before_decoding(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    Image.init()  # imports Pillow's plugins
    begin = time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_peak()
    tracemalloc.start()
    refused(path, "image_too_large")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - begin < 1
    assert peak < 20e6
    assert memory_peak() - before < 50e6  # Pillow's own buffers, which Python does not trace: 300 MB if it had decoded


def memory_peak() -> int:
    """The most memory that this process has had since the peak was last cleared, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_hundred_megapixels_are_accepted(tmp_path):
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "a.png")
    prepared = load(tmp_path / "a.png", (784, 16 * 784))
    assert prepared.original_size == (10_000, 10_000)
    assert (prepared.pixels == 255).all()


@pytest.mark.parametrize("place", ["storage.images.lookup.open_regular", "storage.images.bounded.read_bounded"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENFILE, errno.ETIMEDOUT])
def test_other_os_errors_are_transient(tmp_path, monkeypatch, number, place):
    photograph().save(tmp_path / "a.png")
    monkeypatch.setattr(place, raising(number))
    with pytest.raises(TransientError) as caught:
        load(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in str(caught.value)
    assert os.strerror(number) in str(caught.value)


@pytest.mark.parametrize("place", ["open", "new"])
def test_lack_of_memory_is_transient(tmp_path, monkeypatch, place):
    def fail(*_args, **_options):
        raise MemoryError

    photograph("RGBA").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, place, fail)
    with pytest.raises(TransientError, match=r"a\.png: not enough memory"):
        load(tmp_path / "a.png")


def raising(number: int) -> Callable[..., bytes]:
    def read(*_arguments: object) -> bytes:
        raise OSError(number, os.strerror(number))

    return read


# Damaged at random


def seeds() -> dict[str, bytes]:
    drawing = Image.new("RGB", (40, 30), "white")
    ImageDraw.Draw(drawing).ellipse((5, 5, 30, 25), fill="red", outline="blue")
    frames = [drawing.convert("P"), drawing.rotate(90).convert("P")]
    found = {
        "jpeg": encoded(drawing, "jpeg"),
        "progressive": encoded(drawing, "jpeg", progressive=True),
        "png": encoded(drawing, "png"),
        "palette": encoded(drawing.convert("P"), "png", transparency=3),
        "png16": encoded(Image.fromarray(levels(65535)[:30, :40]), "png"),
        "gif": encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "bmp": encoded(drawing, "bmp"),
        "tiff": encoded(drawing, "tiff"),
        "deflated": encoded(drawing, "tiff", compression="tiff_adobe_deflate"),
        "float": encoded(Image.fromarray(levels(255)[:30, :40].astype(np.float32)), "tiff"),
        "ico": encoded(drawing, "ico"),
        "tga": encoded(drawing, "tga"),
        "pcx": encoded(drawing, "pcx"),
        "ppm": encoded(drawing, "ppm"),
    }
    if features.check("webp"):
        found["webp"] = encoded(drawing, "webp")
        found["animated"] = encoded(drawing, "webp", save_all=True, append_images=[drawing.rotate(90)])
    if features.check("jpg_2000"):
        found["jpeg2000"] = encoded(drawing, "jpeg2000")
    if features.check("avif"):
        found["avif"] = encoded(drawing, "avif")
    return found


SEEDS = seeds()
MUTATION = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4), st.sampled_from("=+-<"))


def mutated(data: bytes, mutations: list[tuple[float, bytes, str]]) -> bytes:
    """Overwrite, insert, delete or cut at places that are shares of the length."""
    result = bytearray(data)
    for place, new, kind in mutations:
        at = int(place * len(result))
        if kind == "<" and at > 20:
            del result[at:]
        elif kind == "-":
            del result[at : at + len(new)]
        else:
            result[at : at + (len(new) if kind == "=" else 0)] = new
    return bytes(result)


def survives(path: Path, data: bytes) -> None:
    """A damaged file is an image or a permanent failure that names it, never another exception."""
    path.write_bytes(data)
    try:
        prepared = load(path, (784, 16 * 784))
    except PermanentError as error:
        assert error.reason.startswith("image_")
        assert str(path) in error.message
    else:
        assert prepared.pixels.ndim == 3
        assert prepared.pixels.shape[2] == 3


@pytest.mark.parametrize("kind", SEEDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(MUTATION, min_size=1, max_size=6))
def test_damaged_files_are_permanent_failures(tmp_path, kind, mutations):
    survives(tmp_path / f"a.{kind}", mutated(SEEDS[kind], mutations))


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_headers_are_permanent_failures(tmp_path, kind):
    """Hypothesis seldom hits the few bytes that say sizes and types: go through them."""
    dice = random.Random(0)
    for at in range(min(64, len(SEEDS[kind]))):
        for value in (0, 1, 0x7F, 0xFF, dice.randrange(256)):
            data = bytearray(SEEDS[kind])
            data[at] = value
            survives(tmp_path / f"a.{kind}", bytes(data))


@pytest.mark.parametrize("size", [(0, 0), (0, 10), (10, 0)])
def test_no_pixels_at_all(tmp_path, size):
    data = bytearray(encoded(Image.new("P", (10, 10)), "gif"))
    data[6:10] = struct.pack("<HH", *size)
    frame = data.index(b",")
    data[frame + 5 : frame + 9] = struct.pack("<HH", *size)
    (tmp_path / "a.gif").write_bytes(data)
    refused(tmp_path / "a.gif", "image_unreadable")


# Preprocessor


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return FakeEngine(EngineSpec("fake", "fake", "main", "float32", "")).info


@pytest.fixture
def images(tmp_path) -> Path:
    directory = tmp_path.resolve() / "images"
    directory.mkdir()
    photograph().save(directory / "a.png")
    photograph(size=(64, 96)).save(directory / "b.png")
    return directory


class Decodes:
    """Counts what is decoded, and holds it back until `go`."""

    def __init__(self, monkeypatch) -> None:
        self.paths: list[Path] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        monkeypatch.setattr(preprocess, "load_quick", self)

    def __call__(self, path: Path, factor: int, limits: tuple[int, int], **options: bool) -> PreparedImage | None:
        self.paths.append(path)
        self.entered.set()
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return load_quick(path, factor, limits, **options)


@pytest.fixture
def decodes(monkeypatch) -> Decodes:
    return Decodes(monkeypatch)


def test_image_is_decoded_once_for_all_its_questions(info, images, decodes):
    preprocessor = Preprocessor(info)
    with ThreadPoolExecutor(60) as pool:
        futures = [pool.submit(preprocessor.image, "ab"[i % 2] + ".png", images, (), LIMITS) for i in range(60)]
        assert decodes.entered.wait(20)
        time.sleep(0.05)  # so that the others wait for it rather than find it
        decodes.go.set()
        prepared = [future.result(20) for future in futures]
    assert sorted(decodes.paths) == [str(images / "a.png"), str(images / "b.png")]
    assert len({id(image) for image in prepared[::2]}) == len({id(image) for image in prepared[1::2]}) == 1
    assert preprocessor.image("sub/../a.png", images, (), LIMITS) is prepared[0]


def test_limits_are_part_of_the_image(info, images, decodes):
    decodes.go.set()
    preprocessor = Preprocessor(info)
    large, small = (preprocessor.image("a.png", images, (), limits) for limits in (LIMITS, (784, 784)))
    assert small.resized_size == (28, 28) != large.resized_size
    assert len(decodes.paths) == 2


def test_error_reaches_all_who_wait_and_is_not_kept(info, images, decodes):
    preprocessor = Preprocessor(info)
    decodes.error = TransientError("a.png: stale file handle")
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(preprocessor.image, "a.png", images, (), LIMITS) for _ in range(20)]
        assert decodes.entered.wait(20)
        time.sleep(0.05)
        decodes.go.set()
        assert {str(future.exception(20)) for future in futures} == {"a.png: stale file handle"}
    failed = len(decodes.paths)
    assert failed < 20
    decodes.error = None
    assert preprocessor.image("a.png", images, (), LIMITS).original_size == (96, 64)
    assert len(decodes.paths) == failed + 1


def test_memory_is_bounded(info, images, decodes, monkeypatch):
    """The image is enlarged to 4, 9, 16 … merged tokens of 2,352 bytes each: the last two fit."""
    monkeypatch.setattr(preprocess, "_IDLE_IMAGE_BYTES", (16 + 25) * 2352)
    decodes.go.set()
    preprocessor = Preprocessor(info)
    sizes = [(784 * i * i, 784 * i * i) for i in range(2, 6)]
    Image.new("RGB", (56, 56)).save(images / "square.png")
    assert [preprocessor.image("square.png", images, (), size).nbytes // 2352 for size in sizes] == [4, 9, 16, 25]
    preprocessor.image("square.png", images, (), sizes[-2])
    preprocessor.image("square.png", images, (), sizes[-1])
    assert len(decodes.paths) == 4
    preprocessor.image("square.png", images, (), sizes[0])
    assert len(decodes.paths) == 5


@pytest.mark.parametrize("image_id", ["../secret.png", "/etc/hostname", "link.png", "a\0b.png"])
def test_outside_the_root(info, images, image_id):
    photograph().save(images.parent / "secret.png")
    (images / "link.png").symlink_to(images.parent / "secret.png")
    with pytest.raises(PermanentError) as caught:
        Preprocessor(info).image(image_id, images, (), LIMITS)
    assert caught.value.reason == "image_outside_root"
    assert repr(image_id) in caught.value.message


def test_further_roots_are_admitted(info, images):
    elsewhere = images.parent / "elsewhere"
    elsewhere.mkdir()
    photograph().save(elsewhere / "c.png")
    (images / "c.png").symlink_to(elsewhere / "c.png")
    assert Preprocessor(info).image("c.png", images, (elsewhere,), LIMITS).original_size == (96, 64)


def test_request_is_the_prompt(info, images):
    preprocessor = Preprocessor(info)
    image = preprocessor.image("a.png", images, (), LIMITS)
    request = preprocessor.request([image], "Why?", Recipe(layers=(0, 3), max_new_tokens=20))
    [pixels] = request.images
    assert pixels is image.pixels
    assert request.image_key == image.key
    assert request.suffix_ids == (*info.prompt.after_image_ids, *preprocessor._tokenize("Why?"), *info.prompt.tail_ids)
    patches = image.pixels.shape[0] // 28 * (image.pixels.shape[1] // 28)
    assert request.num_tokens == len(info.prompt.head_ids) + patches + len(request.suffix_ids)
    assert request.recipe == Recipe(layers=(0, 3), max_new_tokens=20)


@pytest.mark.parametrize(("positions", "limit"), [(128_000, 32_768), (100, 100)])
def test_prompt_too_long(info, images, positions, limit):
    """Beyond 32,768 tokens, or what the model has positions for, transformers computes on without a word."""
    preprocessor = Preprocessor(replace(info, max_position_embeddings=positions))
    image = preprocessor.image("a.png", images, (), LIMITS)
    room = limit - preprocessor.request([image], "", Recipe(layers=(0,), max_new_tokens=1)).num_tokens
    assert preprocessor.request([image], "x" * room, Recipe(layers=(0,), max_new_tokens=1)).num_tokens == limit
    with pytest.raises(PermanentError, match=rf"has {limit + 1} tokens.*takes {limit}") as caught:
        preprocessor.request([image], "x" * (room + 1), Recipe(layers=(0,), max_new_tokens=1))
    assert caught.value.reason == "prompt_too_long"


# From an object store


def test_an_image_from_an_object_store_is_the_same(tmp_path, s3_url, s3_server):
    photograph().save(tmp_path / "a.png")
    s3_server.write(f"{s3_url}/sub/a b.png", (tmp_path / "a.png").read_bytes())
    remote, local = load(f"{s3_url}/sub/a b.png"), load(tmp_path / "a.png")
    assert (remote.sha256, remote.key, remote.original_size) == (local.sha256, local.key, local.original_size)
    assert (remote.pixels == local.pixels).all()


def test_what_can_be_wrong_with_an_object(s3_url, s3_server, monkeypatch):
    for name, data in (("empty.png", b""), ("text.png", b"no image")):
        s3_server.write(f"{s3_url}/{name}", data)
    for name, reason in (("empty.png", "image_empty"), ("text.png", "image_unreadable"), ("gone.png", "image_missing")):
        with pytest.raises(PermanentError, match=f"{s3_url}/{name}") as permanent:
            load(f"{s3_url}/{name}")
        assert permanent.value.reason == reason
    monkeypatch.setattr("storage.images.bounded.MAX_IMAGE_BYTES", 7)
    with pytest.raises(PermanentError, match="more than 7 bytes"):
        load(f"{s3_url}/text.png")
    s3_server.control(deny="GET")
    with pytest.raises(TransientError, match=f"{s3_url}/text.png: access denied"):
        load(f"{s3_url}/text.png")


def test_images_of_a_question_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 60)).save(tmp_path / name)
    info = FakeEngine(EngineSpec("fake:0", "fake", "main", "float32", "")).info
    unsized, places = replace(info, factor=None, most_image_tokens=4), (tmp_path, (), (None, None))
    with Preprocessor(unsized).hold(["a.png", "b.png"], *places) as images:
        assert [image.original_size for image in images] == [(60, 60)] * 2
    with pytest.raises(PermanentError, match="65 images are named: a question takes up to 64"):
        Preprocessor(unsized).hold(["a.png"] * 65, *places).__enter__()
    monkeypatch.setattr(preprocess, "_QUESTION_BYTES", 2 * 60 * 60 * 3 - 1)
    with pytest.raises(PermanentError, match="2 of the question's images take") as caught:
        Preprocessor(unsized).hold(["a.png", "b.png"], *places).__enter__()
    assert caught.value.reason == "image_too_large"
