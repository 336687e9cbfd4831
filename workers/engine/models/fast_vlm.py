"""FastVLM: a tower of convolutions, from the package timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.engine.models import base
from workers.engine.models.base import Inputs


class Family(base.Family):
    """Its tower's output has channels first."""

    encoder_definition = "last_map"

    def tower(self) -> Any:
        """Return the whole tower."""
        return self.core.vision_tower

    def encoder_mean(self, out: Tensor, inputs: Inputs) -> Tensor:
        """Return the mean (E,) over the places of the last maps, (images, E, rows, columns)."""
        return torch.cat([*out.flatten(2)], dim=1).mean(1)
