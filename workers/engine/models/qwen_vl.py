"""Qwen2-VL, Qwen3-VL and Qwen3.5: images come resized, to multiples of a merged patch."""

from __future__ import annotations

import numpy as np

from workers.engine.models import base
from workers.engine.models.base import Inputs


class Family(base.Family):
    """Its processor leaves the size of an image alone."""

    @property
    def factor(self) -> int:
        """The side in pixels of the square that becomes one token."""
        vision = self.model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    def inputs(self, text: str, image: np.ndarray) -> Inputs:
        """Return what the processor makes of a rendered prompt and a resized image."""
        return self.on_device(self.processor(text=[text], images=[image], do_resize=False, return_tensors="pt"))
