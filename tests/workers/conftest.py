"""What tests of engines share: tiny checkpoints of families, and images of several shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny import NotBuiltError, build_tiny

SIZES = ((90, 150), (210, 100), (120, 120), (60, 240))  # of the images: height and width


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a family's checkpoint, built once."""
    directory = tmp_path_factory.mktemp("tiny")

    def of(family: str) -> Path:
        place = directory / family
        try:
            return place if place.exists() else build_tiny(family, place)
        except NotBuiltError as reason:
            pytest.skip(str(reason))

    return of


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes."""
    directory, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(7)
    for number, (height, width) in enumerate(SIZES):
        small = Image.fromarray(random.integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(directory / f"{number}.png")
    return directory
