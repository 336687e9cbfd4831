"""Qwen2-VL, Qwen3-VL and Qwen3.5: images come resized, to multiples of a merged patch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.engine.models import base
from workers.engine.models.base import Inputs


class Family(base.Family):
    """Its processor leaves the size of an image alone."""

    @property
    def factor(self) -> int:
        """The side in pixels of the square that becomes one token."""
        vision = self.model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    @property
    def together(self) -> bool:  # type: ignore[override]
        """Patches of several images are one row, which `image_grid_thw` takes apart."""
        return not self.recurrent  # padding would go through a recurrent state

    def _processing(self, rows: int) -> dict[str, Any]:
        return super()._processing(rows) | {"do_resize": False}

    def encoder_means(self, out: Tensor, inputs: Inputs) -> list[Tensor]:
        """Return the mean (E,) over each image's patches."""
        sizes: list[int] = inputs["image_grid_thw"].prod(dim=1).tolist()
        return [patches.mean(0) for patches in torch.split(out.flatten(0, -2), sizes)]
