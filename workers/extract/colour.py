"""Pictures that Pillow's own conversion to RGB would lose something of: transparency, or more than 8 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image

_TRANSPARENT_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}


def needs_care(image: Image.Image) -> bool:
    """Tell whether Pillow's own conversion to RGB loses something: transparency, or more than 8 bits."""
    return image.mode.startswith("I") or image.mode in {"F", *_TRANSPARENT_MODES} or "transparency" in image.info


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the first frame of such an image in RGB: transparency on white, 16 bits scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bits(image).convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Map grey levels of more than 8 bits to 8; Pillow's own conversion clips them to white.

    A file of 32-bit integers or floats does not say what white is: it is the least usual one that its values fit under.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((level for level in usual if values.max() <= level), usual[-1])
    return Image.fromarray(np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8))
