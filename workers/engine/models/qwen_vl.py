"""Qwen2-VL, Qwen3-VL and Qwen3.5: images come resized, to multiples of a merged patch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engine.models import base
from workers.engine.models.base import Inputs
from workers.errors import in_a_line

logger = logging.getLogger(__name__)


class Flat(torch.nn.Module):
    """A convolution over patches that do not overlap, each given alone, as the matrix product that it is."""

    def __init__(self, convolution: torch.nn.Conv3d) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(convolution.weight.flatten(1), requires_grad=False)  # (E, values of a patch)
        self.bias = convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """Return (N, E) of (N, C, T, H, W)."""
        return torch.nn.functional.linear(patches.flatten(1), self.weight, self.bias)


class Family(base.Family):
    """Its processor leaves the size of an image alone."""

    _where: Mapping[str, Any] = MappingProxyType({})  # a device that processes images

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
        return {**super()._processing(rows), "do_resize": False, **self._where}

    def speed_up(self) -> None:
        """Embed patches by a matrix product, and have a GPU normalise pixels and cut them into patches."""
        embedding = self.core.visual.patch_embed
        if isinstance(getattr(embedding, "proj", None), torch.nn.Conv3d):
            embedding.proj = Flat(embedding.proj)
        device = self.core.visual.device
        if device.type == "cuda":
            self.process_on(device)

    def process_on(self, device: torch.device) -> None:
        """Have a device process images, if it makes the same of them."""
        image = np.random.default_rng(0).integers(0, 256, (4 * self.factor, 3 * self.factor, 3), np.uint8)
        here = self.processor.image_processor(images=[image], do_resize=False, return_tensors="pt")["pixel_values"]
        try:
            options = {"do_resize": False, "device": device, "return_tensors": "pt"}
            there = self.processor.image_processor(images=[image], **options)["pixel_values"]
        except (TypeError, ValueError, RuntimeError) as error:  # one that does not know of devices
            logger.warning("images are processed on the CPU: %s", in_a_line(error))
            return
        if torch.equal(here, there.cpu()):
            self._where = {"device": device}
        else:
            logger.warning("images are processed on the CPU: %s makes others of them", device)

    def encoder_means(self, out: Tensor, inputs: Inputs) -> list[Tensor]:
        """Return the mean (E,) over each image's patches."""
        sizes: list[int] = inputs["image_grid_thw"].prod(dim=1).tolist()
        return [patches.mean(0) for patches in torch.split(out.flatten(0, -2), sizes)]
