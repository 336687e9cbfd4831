"""The dimensions of a checkpoint, from its files or, of a released one, from its name: what estimates of size need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import UserError
from workers.checkpoint.families import SIZED
from workers.checkpoint.identity import local_directory

_FACTOR, _MIN_PIXELS, _MAX_PIXELS = 28, 56 * 56, 14 * 14 * 4 * 16384  # of every released Qwen2.5-VL
_UNNAMED_MIN_PIXELS, _UNNAMED_MAX_PIXELS = 56 * 56, 28 * 28 * 1280  # of the processor, where a checkpoint names none
_RELEASED = {  # hidden size, decoder layers, about how many bytes the bfloat16 weights have
    "3b": (2048, 36, 7_500_000_000),
    "7b": (3584, 28, 16_600_000_000),
    "32b": (5120, 64, 66_900_000_000),
    "72b": (8192, 80, 146_800_000_000),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A checkpoint's dimensions. `factor` is the side, in pixels, of the square that becomes one vision token.

    Without a factor and pixel limits its processor sizes images in a way of its own.
    """

    hidden_size: int
    vision_hidden_size: int
    num_hidden_layers: int
    factor: int | None
    min_pixels: int | None
    max_pixels: int | None
    weight_bytes: int
    model_type: str | None = None


def shape_of(model: str) -> Shape | None:
    """Return a checkpoint's dimensions; None for a hub model that is not one of the released ones. Raises UserError."""
    directory = local_directory(model)
    if directory is not None:
        return _read(directory)
    for size, (hidden, layers, weights) in _RELEASED.items():
        if model.lower() == f"qwen/qwen2.5-vl-{size}-instruct":
            return Shape(hidden, 1280, layers, _FACTOR, _MIN_PIXELS, _MAX_PIXELS, weights, "qwen2_5_vl")
    return None


def _read(directory: Path) -> Shape:
    try:
        config = json.loads((directory / "config.json").read_text())
        text, vision = config.get("text_config", config), config["vision_config"]
        sized = config.get("model_type") in SIZED
        limits = _limits(directory) if sized else (None, None)
        return Shape(
            hidden_size=int(text.get("hidden_size", config.get("hidden_size"))),
            vision_hidden_size=int(vision.get("vision_output_dim") or vision.get("embed_dim") or vision["hidden_size"]),
            num_hidden_layers=int(text.get("num_hidden_layers", config.get("num_hidden_layers"))),
            factor=int(vision.get("patch_size", 14)) * int(vision.get("spatial_merge_size", 2)) if sized else None,
            min_pixels=limits[0],
            max_pixels=limits[1],
            weight_bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
            model_type=config.get("model_type"),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--model {directory}: its configuration is damaged ({error!r})") from error


def _limits(directory: Path) -> tuple[int, int]:
    """Return the pixel limits that transformers' image processor takes from a checkpoint's files.

    Source: `get_image_processor_dict` and `Qwen2VLImageProcessor.__init__` in transformers 5.23; 4.57 has the same defaults.
    """
    values: dict[str, Any] = _json(directory / "processor_config.json").get("image_processor") or _json(
        directory / "preprocessor_config.json"
    )
    size = values.get("size") or {}
    minimum, maximum = values.get("min_pixels"), values.get("max_pixels")
    if minimum is None:
        minimum = size.get("shortest_edge", _UNNAMED_MIN_PIXELS)
    if maximum is None:
        maximum = size.get("longest_edge", _UNNAMED_MAX_PIXELS)
    return int(minimum), int(maximum)


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}
