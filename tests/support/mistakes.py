"""Mistakes of the engine that its tests must find: each patches one in. A check is worth what it would catch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workers.engine import shared_prefix
from workers.engine.shared_prefix import QwenEngine


def one_dimensional(patch: pytest.MonkeyPatch) -> None:
    """Count the image's positions on as those of text."""
    original = shared_prefix.prefix_positions
    patch.setattr(shared_prefix, "prefix_positions", lambda *image: torch.arange(original(*image).shape[1]).expand(3, -1))


def height_and_width_swapped(patch: pytest.MonkeyPatch) -> None:
    """Take rows for columns."""
    original, swap = shared_prefix.prefix_positions, torch.tensor([0, 2, 1])
    patch.setattr(shared_prefix, "prefix_positions", lambda *image: original(*image)[swap])


def suffix_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Begin the question a position late."""
    original = QwenEngine._prefill_images

    def prefill(self: QwenEngine, images: Any, recipe: Any) -> Any:
        prefixes = original(self, images, recipe)
        for prefix in prefixes:
            prefix.row.next_position += 1
        return prefixes

    patch.setattr(QwenEngine, "_prefill_images", prefill)


def padding_mask_ignored(patch: pytest.MonkeyPatch) -> None:
    """Attend to padding."""
    original = QwenEngine._forward

    def forward(self: QwenEngine, batch: Any, embedded: Any, positions: Any, lengths: Any, recipe: Any) -> Any:
        return original(self, batch, embedded, positions, [embedded.shape[1]] * len(lengths), recipe)

    patch.setattr(QwenEngine, "_forward", forward)


MISTAKES = (one_dimensional, height_and_width_swapped, suffix_off_by_one, padding_mask_ignored)
